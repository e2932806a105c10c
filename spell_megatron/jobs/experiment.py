"""NeMo-Run's experiment of a run: the job that Slurm gets, or the processes on this machine.

Like `executors` it needs nemo-run, and is imported after NEMORUN_HOME has been set.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import fiddle
import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.core.execution.slurm import SlurmJobDetails
from torchx.specs import parse_app_handle

from spell_megatron.errors import UserError
from spell_megatron.jobs.executors import gpu_fields
from spell_megatron.jobs.job import Step
from spell_megatron.jobs.site import Site


class SlurmRun:
    """A run as an experiment of NeMo-Run on Slurm. A context manager."""

    def __init__(self, name: str, executor: run.Config, steps: Sequence[Step], prologue: str, site: Site) -> None:
        if any("/nemo_run" in text for text in (prologue, *(step.script for step in steps))):
            raise UserError(
                "A path in the run's settings or in the cluster's file has a part that begins with nemo_run. NeMo-Run "
                "replaces /nemo_run by the job's folder wherever it stands. Rename that folder, or make a link to it "
                "under another name."
            )
        title = re.sub(r"[^\w.-]+", "-", name)
        executor.setup_lines = prologue
        self._steps = steps
        self._executors = [self._executor(executor, step, title, site) for step in steps]
        self._experiment = run.Experiment(
            title,
            log_level="WARN",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,  # it would need Slurm's accounting
            serialize_metadata_for_scripts=False,
        )

    def _executor(self, executor: run.Config, step: Step, title: str, site: Site) -> run.SlurmExecutor:
        executor.ntasks_per_node = self._steps[0].tasks_per_node
        built = fiddle.build(executor)
        own = self._steps[0] if not site.heterogeneous else step
        asked = gpu_fields(site, engines=own is not self._steps[0], tasks_per_node=own.tasks_per_node)
        if site.heterogeneous and site.gpu_request.startswith("gpus-per-"):
            asked.setdefault(site.gpu_request.replace("-", "_"), 0)  # one part may have GPUs, and the other none
        for field in ("gpus_per_node", "gpus_per_task", "gres"):
            setattr(built, field, asked.get(field))
        if site.heterogeneous:
            # The first node of a step is then counted within its component.
            built.heterogeneous, built.nodes, first_node = True, step.nodes, 0
            built.ntasks_per_node = step.tasks_per_node
        else:
            first_node = step.first_node
        built.job_name_prefix = f"{title}."
        built.job_details = SlurmJobDetails(job_name=f"{title}.{step.name}")
        place = [f"--nodes={step.nodes}", f"--ntasks={step.nodes * step.tasks_per_node}"]
        place += [f"--ntasks-per-node={step.tasks_per_node}", f"--relative={first_node}"]
        place.append("--export=ALL")  # also where the site's default, or the job's, is to pass nothing on
        if step.nodes * step.tasks_per_node > 1:
            place.append("--label")  # the number of the task, before each line of the log that they share
        if built.gpus_per_task:  # by which srun would give a step of fewer tasks a part of its nodes' GPUs
            kind, number = site.gpus_of(engines=own is not self._steps[0])
            place.append(f"--gpus-per-node={kind}:{number}" if kind else f"--gpus-per-node={number}")
        if built.cpus_per_task:
            place.append(f"--cpus-per-task={built.cpus_per_task * built.ntasks_per_node // step.tasks_per_node}")
        if site.colocated:
            place.append("--overlap")  # both steps have the nodes and their GPUs
        if len(self._steps) == 1:
            place.append("--cpu-bind=none")  # the first process starts the engines, which need cores beyond its own
        built.srun_args = [*(built.srun_args or []), *place]
        return built

    def __enter__(self) -> SlurmRun:
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
        try:
            self._experiment.run(detach=True)
        except UnexpectedExit as error:
            said = (error.result.stderr or error.result.stdout).strip()
            raise UserError(
                f"The job could not be submitted; `{error.result.command}` says: {said}. If it names an option, "
                "correct it in the cluster's file; if there is no sbatch, run this on a login node, or set ssh.host."
            ) from error
        except (OSError, SystemExit) as error:  # NeMo-Run exits where the login is refused
            tunnel = self._executors[0].tunnel
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
    """Run a script by NeMo-Run's LocalExecutor, to its end; returns whether it succeeded."""
    title = re.sub(r"[^\w.-]+", "-", name)
    with run.Experiment(title, log_level="WARN", enable_goodbye_message=False) as experiment:
        experiment.add(run.Script(inline=script), executor=fiddle.build(executor), name="spell", tail_logs=True)
        experiment.run()
    return all(str(state["status"]) == "SUCCEEDED" for state in experiment.status(return_dict=True).values())
