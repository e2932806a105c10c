"""`spell launch`: from a run's settings and a cluster's file to a job of Slurm, or to its dry run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from spell_megatron.config.faults import raise_faults
from spell_megatron.config.reading import read_section
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.files import write_text
from spell_megatron.jobs.job import local_script, prologue, steps
from spell_megatron.jobs.memory_plan import memory_plan
from spell_megatron.jobs.paths import missing_files, place
from spell_megatron.jobs.site import Site
from spell_megatron.jobs.site_faults import site_faults
from spell_megatron.monitoring.queue import SUBMITTED

_OF_THE_CLIENT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""By which Slurm's commands find their cluster, and prove who asks."""

_NUMBERS = ("nodes", "gpus_per_node", "cpus_per_task")
_OF_SITE = {name: name for name in (*_NUMBERS, "account", "partition", "qos", "time")} | {"mem": "memory"}
"""Fields of NeMo-Run's executor that have a key in the cluster's file."""


def launch(
    config: Config,
    site_file: Path | None,
    of_site: Sequence[str],
    of_executor: Sequence[str],
    *,
    sources: str,
    on_slurm: bool = True,
    resume: bool = False,
    dry_run: bool = False,
) -> int:
    """Submit a run to Slurm, or run it here by NeMo-Run's local executor; returns the exit status.

    Args:
        config: the run's settings.
        site_file: description of the Slurm cluster; the local executor needs none.
        of_site: overrides of it, `key=value`.
        of_executor: overrides of NeMo-Run's executor, `field=value`.
        sources: the files that the run's settings come from, for messages.
        on_slurm: else on this machine.
        resume: continue the run from its newest checkpoint.
        dry_run: print what would be submitted, and submit nothing.

    Raises:
        UserError: faults in the cluster's file, or between it and the run; nemo-run is not there; Slurm refuses the
            job.
    """
    _forget_outer_job()
    if site_file is None and on_slurm:
        raise UserError(
            "A job needs to know its cluster: give the file with --cluster. slurm/cluster.example.yaml is one to "
            "start from. To run on this machine without Slurm, say --executor local."
        )
    if on_slurm:
        of_executor, moved = _moved_to_site(of_executor)
        of_site = [*of_site, *moved]
    site = read_section(Site, site_file, of_site).checked()
    place(config, site, weights=not dry_run)
    _prepare_nemo_run(site)
    if not on_slurm:
        return _run_here(config, site, of_executor, resume, dry_run)
    return _submit(config, site, of_executor, f"{site_file} with {sources}", resume, dry_run)


def _forget_outer_job() -> None:
    """Remove what this shell holds for Slurm's commands: of an interactive job around it, and options of sbatch.

    NeMo-Run and sbatch would act on them, and sbatch's options would win over the cluster's file.
    """
    options = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("SBATCH_")]
    if options:
        print(
            f"spell: warning: {', '.join(options)} of this shell is not used: the cluster's file decides. Write what "
            "the job needs there.",
            file=sys.stderr,
        )
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")) and name not in _OF_THE_CLIENT:
            del os.environ[name]


def _moved_to_site(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of NeMo-Run's executor, without those that have a key in the cluster's file; and the words of these keys.

    So they are checked as in the file.
    """
    left, moved = [], []
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or field not in _OF_SITE:
            left.append(word)
        elif value in ("None", "null") or field in _NUMBERS:
            moved.append(f"{_OF_SITE[field]}={value.replace('None', 'null')}")
        else:  # text, which YAML might take for something else
            moved.append(f"{_OF_SITE[field]}={json.dumps(value.strip(chr(34) + chr(39)))}")
    return left, moved


def _prepare_nemo_run(site: Site) -> None:
    """What must be done before nemo_run is imported.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("nemo_run") is None:
        raise UserError(
            "spell launch needs nemo-run, which this Python does not have. It needs other versions of packages than "
            'vLLM does, so install it into an environment of its own: `pip install "spell_megatron[slurm]"` in a new '
            "one, or in a clone of the repository `make environment-slurm`, which makes .venv-slurm. "
            "Then use .venv-slurm/bin/spell launch ..."
        )
    if not site.ssh.host:
        # NeMo-Run writes the job's scripts here, and the nodes read them.
        os.environ.setdefault("NEMORUN_HOME", str(site.folder / "nemo-run"))


def _run_here(config: Config, site: Site, of_executor: Sequence[str], resume: bool, dry_run: bool) -> int:
    from spell_megatron.jobs import executors
    from spell_megatron.jobs.experiment import run_here

    executor = executors.local()
    executors.override(executor, of_executor)
    script = local_script(site, config, resume)
    if dry_run:
        print(f"# Script, with the run's settings\n\n{script}\n{memory_plan(config, site)}")
        return 0
    return 0 if run_here(config.run.name, executor, script) else 1


def _submit(config: Config, site: Site, of_executor: Sequence[str], sources: str, resume: bool, dry_run: bool) -> int:
    from spell_megatron.jobs import executors
    from spell_megatron.jobs.experiment import SlurmRun

    executor = executors.slurm_executor(site)
    executors.override(executor, of_executor)
    raise_faults([*site_faults(site, config), *missing_files(config, site)], sources)
    planned = steps(site, config, resume)
    with SlurmRun(config.run.name, executor, planned, prologue(config), site) as experiment:
        if dry_run:
            print(f"# Batch script, with the run's settings\n\n{experiment.batch_script()}")
            for step in planned:
                print(f"\n# Script of the {step.name}\n\n{step.script}")
            print(memory_plan(config, site))
            return 0
        job, logs = experiment.submit()
    where = f"{site.ssh.host}:" if site.ssh.host else ""
    folder = config.run.output_dir / config.run.name
    if not site.ssh.host:
        (folder / SUBMITTED).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / SUBMITTED, job)
    print(f"Submitted as job {job}. Watch it with `spell status {folder}`. Stop it with `spell stop {folder}`")
    print(f"or `scancel {job}`; it saves a checkpoint first.")
    print(f"Run folder  {where}{folder}")
    print(f"Logs        {where}{logs}/*_{job}*.out")
    return 0
