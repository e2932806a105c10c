"""NeMo-Run: executors of a cluster's file, and the experiment of a run.

Needs nemo-run (the extra `slurm`), and neither torch nor vLLM. NEMORUN_HOME is read when nemo_run is imported, so
this module is imported after it has been set.
"""

# No `from __future__ import annotations`: NeMo-Run reads the annotations of factories.

import dataclasses
import difflib
import io
import re
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path

import fiddle
import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.cli.cli_parser import CLIException, parse_cli_args
from nemo_run.core.execution.slurm import SlurmJobDetails
from torchx.specs import parse_app_handle

from spell_megatron.config.reading import read_section
from spell_megatron.errors import UserError
from spell_megatron.jobs.job import Step
from spell_megatron.jobs.settings import Cluster

HOME = "nemo-run"
"""Folder of NeMo-Run on the cluster, below the cluster's folder."""


@run.cli.factory
def slurm(cluster: str = "cluster.yaml") -> run.Config[run.SlurmExecutor]:
    """The executor that a cluster's file describes; for one node and one task until a run is known."""
    settings = read_section(Cluster, cluster).checked()
    return slurm_executor(settings)


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """This machine, without Slurm."""
    return run.Config(run.LocalExecutor)


def slurm_executor(cluster: Cluster) -> run.Config[run.SlurmExecutor]:
    """NeMo-Run's executor of a cluster, still to be built; its fields can be overridden."""
    ssh = cluster.ssh
    if ssh.host:
        tunnel = run.Config(
            run.SSHTunnel,
            host=ssh.host,
            user=ssh.user,
            port=ssh.port,
            identity=str(ssh.identity.expanduser()) if ssh.identity else None,
            pre_command=ssh.setup or None,
            job_dir=str(cluster.folder / HOME / "experiments"),
        )
    else:
        tunnel = run.Config(run.LocalTunnel, job_dir="")  # below NEMORUN_HOME
    return run.Config(
        run.SlurmExecutor,
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        time=cluster.time,
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_of(engines=False),
        cpus_per_task=cluster.cpus_per_task,
        mem=cluster.memory,
        additional_parameters=_sbatch(cluster),
        container_image=cluster.container.image or None,
        container_mounts=list(cluster.container.mounts),
        tunnel=tunnel,
        packager=run.Config(run.Packager),  # the nodes have spell_megatron already
        monitor_group_job_wait_time=5,
        wait_time_for_group_job=0,
        poll_estimated_start_time=False,
    )


def _sbatch(cluster: Cluster) -> dict[str, str | int | bool]:
    """Options of sbatch for which NeMo-Run has no fields."""
    options = {name.strip("-").replace("-", "_"): value for name, value in cluster.sbatch.items()}
    return options | ({"signal": f"USR1@{cluster.save_seconds}"} if cluster.save_seconds else {})


def override(executor: run.Config, words: Sequence[str]) -> None:
    """Applies NAME=VALUE words, in NeMo-Run's own syntax, to an executor's fields."""
    fields = {field.name: field.type for field in dataclasses.fields(executor.__fn_or_cls__) if field.init}
    for word in words:
        name = re.split(r"\W", word)[0]
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"Did you mean run.executor.{close[0]}?" if close else f"It has {', '.join(fields)}."
            raise UserError(f"run.executor.{name}: NeMo-Run's executor has no such field. {hint}")
        try:
            with redirect_stderr(io.StringIO()):  # the parser shows the whole executor there
                parse_cli_args(executor, [word])
        except CLIException as error:
            kind = getattr(fields[name], "__name__", fields[name])
            raise UserError(f"run.executor.{word}: NeMo-Run cannot read the value as {kind}. Correct it.") from error


class SlurmRun:
    """A run as an experiment of NeMo-Run on Slurm. A context manager."""

    def __init__(self, name: str, executor: run.Config, steps: Sequence[Step], prologue: str, cluster: Cluster) -> None:
        if any("/nemo_run" in text for text in (prologue, *(step.script for step in steps))):
            raise UserError(
                "A path in the run's settings or in the cluster's file begins a part with nemo_run. NeMo-Run replaces "
                "/nemo_run by the job's folder wherever it stands; give that folder another name, or a link to it."
            )
        title = re.sub(r"[^\w.-]+", "-", name)
        executor.setup_lines = prologue
        self._steps = steps
        self._executors = [self._executor(executor, step, title, cluster) for step in steps]
        self._experiment = run.Experiment(
            title,
            log_level="WARN",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,  # it would need Slurm's accounting
            serialize_metadata_for_scripts=False,
        )

    def _executor(self, executor: run.Config, step: Step, title: str, cluster: Cluster) -> run.SlurmExecutor:
        executor.ntasks_per_node = self._steps[0].tasks_per_node
        built = fiddle.build(executor)
        if cluster.heterogeneous:
            # The first node of a step is then counted within its component.
            built.heterogeneous, built.nodes, first_node = True, step.nodes, 0
            built.ntasks_per_node = step.tasks_per_node
            built.gpus_per_node = cluster.gpus_of(engines=step is not self._steps[0]) or 0
        else:
            first_node = step.first_node
        built.job_name_prefix = f"{title}."
        built.job_details = SlurmJobDetails(job_name=f"{title}.{step.name}")
        place = [f"--nodes={step.nodes}", f"--ntasks={step.nodes * step.tasks_per_node}"]
        place += [f"--ntasks-per-node={step.tasks_per_node}", f"--relative={first_node}"]
        if built.cpus_per_task:
            place.append(f"--cpus-per-task={built.cpus_per_task * built.ntasks_per_node // step.tasks_per_node}")
        if cluster.colocated:
            place.append("--overlap")  # both steps have the nodes and their GPUs
        if len(self._steps) == 1:
            place.append("--cpu-bind=none")  # the first process starts the engines, which need cores beyond its own
        built.srun_args = [*(built.srun_args or []), *place]
        return built

    def __enter__(self) -> "SlurmRun":
        self._experiment.__enter__()
        scripts = [run.Script(inline=step.script) for step in self._steps]
        if len(scripts) == 1:
            self._experiment.add(scripts[0], executor=self._executors[0], name="spell")
        else:
            self._experiment.add(scripts, executor=self._executors, name="spell")
        return self

    def __exit__(self, *error: object) -> None:
        self._experiment.__exit__(*error)

    def batch_script(self) -> str:
        """The script that would be submitted; leaves nothing behind."""
        folder = Path(self._experiment._exp_dir)
        try:
            self._experiment.dryrun(log=False, delete_exp_dir=False)
            (script,) = folder.glob("*_sbatch.sh")
            return script.read_text(encoding="utf-8")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # experiments of other launches are in it
                folder.parent.rmdir()

    def submit(self) -> tuple[str, str]:
        """(job id, folder of its logs) of the submitted job.

        Raises:
            UserError: sbatch is not there, or refuses the job; the login node cannot be reached.
        """
        tunnel = self._executors[0].tunnel
        try:
            self._experiment.run(detach=True)
        except UnexpectedExit as error:
            said = (error.result.stderr or error.result.stdout).strip()
            raise UserError(
                f"The job could not be submitted; `{error.result.command}` says: {said}. If it names an option, "
                "correct it in the cluster's file; if there is no sbatch, run this on a login node, or set ssh.host."
            ) from error
        except (OSError, SystemExit) as error:  # NeMo-Run exits where the login is refused
            if not isinstance(tunnel, run.SSHTunnel):
                raise
            raise UserError(
                f"{tunnel.user}@{tunnel.host} cannot be reached by SSH ({error}). Check ssh.host, ssh.user, ssh.port "
                "and ssh.identity in the cluster's file by logging in with `ssh`."
            ) from error
        (job,) = self._experiment.jobs
        handle = job.handle if len(self._steps) == 1 else job.handles[0]
        return parse_app_handle(handle).app_id, f"{job.executor.tunnel.job_dir}/spell"


def run_here(name: str, executor: run.Config, script: str) -> bool:
    """Runs a script by NeMo-Run's LocalExecutor, to its end; whether it succeeded."""
    title = re.sub(r"[^\w.-]+", "-", name)
    with run.Experiment(title, log_level="WARN", enable_goodbye_message=False) as experiment:
        experiment.add(run.Script(inline=script), executor=fiddle.build(executor), name="spell", tail_logs=True)
        experiment.run()
    return all(str(state["status"]) == "SUCCEEDED" for state in experiment.status(return_dict=True).values())
