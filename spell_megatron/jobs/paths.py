"""The files of a run as the nodes of a site see them."""

from __future__ import annotations

from pathlib import Path

from spell_megatron.config.faults import Fault
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.hub import fetch_model, model_name
from spell_megatron.jobs.site import Site


def place(config: Config, site: Site, weights: bool) -> None:
    """Make the paths of the site and of the run absolute, as they are on the nodes.

    A model of the hub is fetched here, where there is a network, into a cache that the nodes see; without `weights`
    only what a plan needs of it.

    Raises:
        UserError: the hub does not give the model, or the cluster is reached by SSH.
    """
    config.run.output_dir = config.run.output_dir.absolute()
    if not site.ssh.host:
        config.model.path = fetch_model(config.model.path, weights)
        site.folder = site.folder.expanduser().absolute()
        site.venv = site.venv and site.venv.expanduser().absolute()
        return
    if name := model_name(config.model.path):
        raise UserError(
            f"There is no folder {name} here, and a model of the hub cannot be fetched from here to {site.ssh.host}. "
            f"Run `hf download {name.repository}` there, and set model.path to the folder that it prints; or submit "
            "the run from a login node."
        )
    here = Path.cwd()

    def there(path: Path) -> Path:  # relative paths have been completed with this machine's current folder
        return site.folder / path.relative_to(here) if path.is_relative_to(here) else path

    config.run.output_dir = there(config.run.output_dir)
    config.model.path = there(config.model.path)
    config.data.documents = there(config.data.documents)
    if config.validation.questions is not None:
        config.validation.questions = there(config.validation.questions)
    if config.selfplay.code is not None:
        config.selfplay.code = there(config.selfplay.code)
    if config.selfplay.prompts.startswith("/"):
        config.selfplay.prompts = str(there(Path(config.selfplay.prompts)))


def missing_files(config: Config, site: Site) -> list[Fault]:
    """Files of the job that this machine, which shares the nodes' filesystem, does not have."""
    if site.ssh.host:
        return []
    paths = {"model.path": config.model.path, "data.documents": config.data.documents}
    if config.validation.questions is not None:
        paths["validation.questions"] = config.validation.questions
    if config.selfplay.code is not None:
        paths["selfplay.code"] = config.selfplay.code
    if site.venv and not site.container.image:
        paths["venv"] = site.venv / "bin" / "activate"
    if site.container.image.startswith("/"):
        paths["container.image"] = Path(site.container.image)
    return [
        Fault((key,), f"there is no {path}. Give a path that exists on this machine and on the nodes")
        for key, path in paths.items()
        if not path.exists()
    ]
