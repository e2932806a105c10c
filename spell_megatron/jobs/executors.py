"""NeMo-Run's executors: what a site's file says, in NeMo-Run's terms, with overrides.

Needs nemo-run (the extra `slurm`), and neither torch nor vLLM. NEMORUN_HOME is read when nemo_run is imported, so
this module is imported after it has been set.
"""

# No `from __future__ import annotations`: NeMo-Run reads the annotations of factories.

import dataclasses
import difflib
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr

import nemo_run as run
from nemo_run.cli.cli_parser import CLIException, parse_cli_args

from spell_megatron.config.reading import read_section
from spell_megatron.errors import UserError
from spell_megatron.jobs.site import Site

CHANGEABLE = (
    *("comment", "constraint", "container_env", "cpus_per_gpu", "exclude", "mem_per_cpu", "mem_per_gpu"),
    *("network", "segment"),
)
"""Fields of SlurmExecutor that neither the cluster's file nor this package sets."""

HOME = "nemo-run"
"""NeMo-Run's folder on the site, below the site's folder."""


@run.cli.factory
def slurm(cluster: str = "cluster.yaml") -> run.Config[run.SlurmExecutor]:
    """The executor that a cluster's file describes, for one node and one task until a run is known."""
    settings = read_section(Site, cluster).checked()
    return slurm_executor(settings)


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """This machine, without Slurm."""
    return run.Config(run.LocalExecutor)


def slurm_executor(site: Site) -> run.Config[run.SlurmExecutor]:
    """NeMo-Run's executor for a site, not built yet, so that its fields can be overridden."""
    ssh = site.ssh
    if ssh.host:
        tunnel = run.Config(
            run.SSHTunnel,
            host=ssh.host,
            user=ssh.user,
            port=ssh.port,
            identity=str(ssh.identity.expanduser()) if ssh.identity else None,
            pre_command=ssh.setup or None,
            job_dir=str(site.folder / HOME / "experiments"),
        )
    else:
        tunnel = run.Config(run.LocalTunnel, job_dir="")  # below NEMORUN_HOME
    return run.Config(
        run.SlurmExecutor,
        account=site.account,
        partition=site.partition,
        qos=site.qos,
        time=site.time,
        nodes=site.nodes,
        **gpu_fields(site, engines=False, tasks_per_node=1),
        cpus_per_task=site.cpus_per_task,
        mem=site.memory,
        additional_parameters=_sbatch(site),
        container_image=site.container.image or None,
        container_mounts=list(site.container.mounts),
        tunnel=tunnel,
        packager=run.Config(run.Packager),  # the nodes have spell_megatron already
        monitor_group_job_wait_time=5,
        wait_time_for_group_job=0,
        poll_estimated_start_time=False,
    )


def gpu_fields(site: Site, *, engines: bool, tasks_per_node: int) -> dict[str, str | int]:
    """How a node with so many tasks asks for its GPUs, as fields of SlurmExecutor; {}: it does not."""
    kind, number = site.gpus_of(engines)
    prefix = f"{kind}:" if kind else ""
    if not number or site.gpu_request == "none":
        return {}
    if site.gpu_request == "gres":
        others = site.sbatch.get("gres")
        return {"gres": f"gpu:{prefix}{number}" + (f",{others}" if others else "")}
    if site.gpu_request == "gpus-per-task":
        return {"gpus_per_task": f"{prefix}{number // tasks_per_node}"}
    return {"gpus_per_node": f"{prefix}{number}"}


def _sbatch(site: Site) -> dict[str, str | int | bool]:
    """Options of sbatch for which NeMo-Run has no fields."""
    options = {name.strip("-").replace("-", "_"): value for name, value in site.sbatch.items()}
    waits = options.get("dependency", True)  # two jobs of one run would write into one folder
    options["dependency"] = waits and ("singleton" if waits is True else f"singleton,{waits}")
    if site.gpu_request == "gres":
        options.pop("gres", None)
    if site.save_seconds:
        options["signal"] = f"USR1@{site.save_seconds}"
    return {name: value for name, value in options.items() if value is not False}


def override(executor: run.Config, words: Sequence[str]) -> None:
    """Apply NAME=VALUE words, in NeMo-Run's own syntax, to an executor's fields.

    Raises:
        UserError: the executor has no such field, the field follows from the run or the cluster's file, or the value
            is not of its type.
    """
    on_slurm = executor.__fn_or_cls__ is run.SlurmExecutor
    fields = {field.name: field.type for field in dataclasses.fields(executor.__fn_or_cls__) if field.init}
    for word in words:
        name = re.split(r"\W", word)[0]
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"Did you mean run.executor.{close[0]}?" if close else f"It has {', '.join(fields)}."
            raise UserError(f"run.executor.{name}: NeMo-Run's executor has no such field. {hint}")
        if on_slurm and name not in CHANGEABLE:
            raise UserError(
                f"run.executor.{name}: this field follows from the run and the cluster's file, which are checked "
                "together. Set it there (`spell launch --help` lists the keys; any option of sbatch as "
                f"cluster.sbatch.OPTION). Free fields are {', '.join(CHANGEABLE)}."
            )
        try:
            with redirect_stderr(io.StringIO()):  # the parser shows the whole executor there
                parse_cli_args(executor, [word])
        except CLIException as error:
            kind = getattr(fields[name], "__name__", fields[name])
            raise UserError(f"run.executor.{word}: NeMo-Run cannot read the value as {kind}. Correct it.") from error
