"""Which of the run's processes this one is: the environment of torchrun, srun and Slurm, read in one place."""

from __future__ import annotations

import os
from typing import NamedTuple

ONE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"
"""CUDA reads it when it starts. With 1, communication overlaps computation as Megatron's tensor parallelism expects."""

_PROTOCOL = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher of torch.distributed sets. Less than all of it has been left behind by something else."""

LAUNCHER_VARIABLES = (
    *_PROTOCOL,
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_ERROR_FILE",
)
"""By which torchrun and launchers like it tell a process its place. A job that Slurm starts must not inherit them."""

TRAINER_VARIABLES = (*LAUNCHER_VARIABLES, ONE_QUEUE)
"""Set for the trainer's processes. An engine must not inherit them: they are not meant for its processes."""


class Ranks(NamedTuple):
    """The place of a trainer process among the others."""

    rank: int
    processes: int
    local_rank: int
    """Number among the trainer processes of its machine."""


ALONE = Ranks(0, 1, 0)
"""The place of the only trainer process."""


def launched() -> Ranks | None:
    """The place of this process if torchrun, srun or a launcher like them started it, else None.

    torchrun comes first, because it may run in a step of Slurm. Then Slurm: RANK and the like may come from the shell
    that submitted the job. A step of one task is no launcher; it may be the shell of `salloc` or `srun --pty`.
    """
    env = os.environ
    if _by_protocol():
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if (tasks := _tasks_of_step()) > 1:
        return Ranks(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0")))
    return None


def _by_protocol() -> bool:
    """Whether the variables of torch.distributed tell the place of this process."""
    complete = all(name in os.environ for name in _PROTOCOL)
    return complete and (child_of_torchrun() or _tasks_of_step() == 0)


def _tasks_of_step() -> int:
    """Number of tasks of the step of Slurm that this process is one of; 0 outside of steps, as in a batch script."""
    env = os.environ
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return 0
    return int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))


def launched_processes() -> int | None:
    """Number of trainer processes if a launcher started this one, else None."""
    place = launched()
    return place.processes if place else None


def rank() -> int:
    """Number of this process among the trainer processes; 0 for the only one."""
    return (launched() or ALONE).rank


def local_processes() -> int | None:
    """Number of trainer processes on this machine if torchrun started this one, else None."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return int(processes) if processes and _by_protocol() else None


def on_several_nodes() -> bool:
    """Whether srun started the trainer's processes on more than one node."""
    return int(os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))) > 1


def child_of_torchrun() -> bool:
    """Whether torchrun, or `processes.launch`, which works like it, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave_step() -> None:
    """Let this process no longer count as a trainer process of its Slurm step."""
    os.environ.pop("SLURM_STEP_ID", None)


def slurm_job() -> str | None:
    """Number of the Slurm job that this process is part of, if any."""
    return os.environ.get("SLURM_JOB_ID")


def slurm_node() -> str | None:
    """Slurm's name of the node that this process runs on, if it is part of a job."""
    return os.environ.get("SLURMD_NODENAME")


def slurm_step() -> int:
    """Number of the step within the Slurm job; 0 outside of one."""
    return int(os.environ.get("SLURM_STEP_ID", "0"))


def slurm_restarts() -> int:
    """How often Slurm has queued this job again; 0 outside of one."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
