"""`spell launch`: from a run's settings and a cluster's file to a job of Slurm, or to its dry run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from spell_megatron.config.faults import Fault, raise_faults
from spell_megatron.config.reading import load_config, read_section, to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.jobs.job import local_script, prologue, steps
from spell_megatron.jobs.settings import Cluster, cluster_faults


def launch(
    config_files: Sequence[Path],
    cluster_file: Path | None,
    words: Sequence[str],
    *,
    on_slurm: bool = True,
    resume: bool = False,
    dry_run: bool = False,
) -> int:
    """Submits a run to Slurm, or runs it here by NeMo-Run's local executor; returns the exit status.

    Args:
        config_files: the run's settings; later files override earlier ones.
        cluster_file: description of the cluster; the local executor needs none.
        words: overrides: `section.key=value` of the run's settings, `cluster.key=value` of the cluster's file, and
            `run.executor.field=value` of NeMo-Run's executor.
        on_slurm: else on this machine.
        resume: continue the run from its newest checkpoint.
        dry_run: print what would be submitted, and submit nothing.

    Raises:
        UserError: faults in either file, or between the two; nemo-run is not there; Slurm refuses the job.
    """
    # Of an interactive job around this one: they would tell NeMo-Run, sbatch and our settings the wrong things.
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del os.environ[name]
    ours: dict[str, list[str]] = {"cluster.": [], "run.executor.": [], "": []}
    for word in words:
        prefix = next(prefix for prefix in ours if word.startswith(prefix))
        ours[prefix].append(word.removeprefix(prefix))
    if cluster_file is None and on_slurm:
        raise UserError(
            "A job needs to know its cluster: give the file with --cluster. slurm/cluster.example.yaml is one to "
            "start from. To run on this machine without Slurm, say --executor local."
        )
    config = load_config(config_files, ours[""])
    cluster = read_section(Cluster, cluster_file, ours["cluster."]).checked()
    if not cluster.ssh.host:
        cluster.folder = cluster.folder.expanduser().absolute()
        cluster.venv = cluster.venv and cluster.venv.expanduser().absolute()
    _place(config, cluster)

    _import_nemo_run(cluster)
    from spell_megatron.jobs import executors

    executor = executors.slurm_executor(cluster) if on_slurm else executors.local()
    executors.override(executor, ours["run.executor."])
    if not on_slurm:
        script = local_script(cluster, config, resume)
        if dry_run:
            print(f"# Script, with the run's settings\n\n{script}\n{_memory_plan(config, cluster)}")
            return 0
        return 0 if executors.run_here(config.run.name, executor, script) else 1

    cluster.nodes, cluster.cpus_per_task = executor.nodes, executor.cpus_per_task
    cluster.gpus_per_node = int(str(executor.gpus_per_node or 0).split(":")[-1])
    faults = [*cluster_faults(cluster, config), *_missing_files(config, cluster)]
    raise_faults(faults, f"{cluster_file} with {', '.join(map(str, config_files))}")
    planned = steps(cluster, config, resume)
    with executors.SlurmRun(config.run.name, executor, planned, prologue(config), cluster) as experiment:
        if dry_run:
            print(f"# Batch script, with the run's settings\n\n{experiment.batch_script()}")
            for step in planned:
                print(f"\n# Script of the {step.name}\n\n{step.script}")
            print(_memory_plan(config, cluster))
            return 0
        job, logs = experiment.submit()
    where = f"{cluster.ssh.host}:" if cluster.ssh.host else ""
    folder = config.run.output_dir / config.run.name
    print(f"Submitted as job {job}. Watch it with `spell status {folder}`, end it with `spell stop {folder}`, which")
    print(f"saves a checkpoint, or `scancel {job}`.")
    print(f"Run folder  {where}{folder}")
    print(f"Logs        {where}{logs}/*_{job}*.out")
    return 0


def _place(config: Config, cluster: Cluster) -> None:
    """Makes the run's paths absolute as they are on the cluster."""
    config.run.output_dir = config.run.output_dir.absolute()
    if not cluster.ssh.host:
        return
    here = Path.cwd()

    def there(path: Path) -> Path:  # relative paths have been completed with this machine's current folder
        return cluster.folder / path.relative_to(here) if path.is_relative_to(here) else path

    config.run.output_dir = there(config.run.output_dir)
    config.model.path = there(config.model.path)
    config.data.documents = there(config.data.documents)
    if config.validation.questions is not None:
        config.validation.questions = there(config.validation.questions)
    if config.selfplay.prompts.startswith("/"):
        config.selfplay.prompts = str(there(Path(config.selfplay.prompts)))


def _missing_files(config: Config, cluster: Cluster) -> list[Fault]:
    """Files of the job that this machine, which shares the nodes' filesystem, does not have."""
    if cluster.ssh.host:
        return []
    paths = {"model.path": config.model.path, "data.documents": config.data.documents}
    if config.validation.questions is not None:
        paths["validation.questions"] = config.validation.questions
    if cluster.venv and not cluster.container.image:
        paths["venv"] = cluster.venv / "bin" / "activate"
    return [
        Fault((key,), f"there is no {path}. Give a path that exists on this machine and on the nodes")
        for key, path in paths.items()
        if not path.exists()
    ]


def _import_nemo_run(cluster: Cluster) -> None:
    if find_spec("nemo_run") is None:
        raise UserError(
            "spell launch needs nemo-run, which this Python does not have. Its versions of other packages clash with "
            "vLLM's, so give it an environment of its own: `make environment-slurm` makes it in .venv-slurm; then "
            "use .venv-slurm/bin/spell launch ..."
        )
    if not cluster.ssh.host:
        # NeMo-Run writes the job's scripts here, and the nodes read them.
        os.environ.setdefault("NEMORUN_HOME", str(cluster.folder / "nemo-run"))


def _memory_plan(config: Config, cluster: Cluster) -> str:
    """What `spell plan` says, by a Python that has torch, if there is one."""
    title = "# Memory plan\n\n"
    if not cluster.gpus_per_node or config.run.device == "cpu":
        return f"{title}(none: the run is one on CPUs)"
    candidates = [cluster.venv / "bin" / "python"] if cluster.venv and not cluster.ssh.host else []
    candidates += [Path(sys.executable)] if find_spec("torch") else []
    python = next((path for path in candidates if path.exists()), None)
    if python is None:
        return (
            f"{title}(none: that needs torch, which this Python lacks, and there is no venv of the cluster here. Where "
            f"spell_megatron is installed: spell plan --config ... --gpu {cluster.gpu} --gpus-per-node "
            f"{cluster.gpus_per_node})"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        arguments = ("--config", file, "--gpu", cluster.gpu, "--gpus-per-node", str(cluster.gpus_per_node))
        plan = subprocess.run(
            [python, "-m", "spell_megatron", "plan", *arguments], capture_output=True, text=True, cwd=folder
        )
    return title + (plan.stdout or plan.stderr).strip()
