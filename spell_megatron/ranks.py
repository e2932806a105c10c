"""Which of the run's processes this one is: the environment of torchrun, srun and Slurm, read in one place."""

from __future__ import annotations

import os
from typing import NamedTuple

ONE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"
"""CUDA reads it when it starts. With 1, communication overlaps computation as Megatron's tensor parallelism expects."""

TRAINER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", ONE_QUEUE)
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
    """The place of this process if torchrun or srun started it, else None."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a bare batch script has no step
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
        return Ranks(int(env["SLURM_PROCID"]), int(tasks), int(env.get("SLURM_LOCALID", "0")))
    return None


def launched_processes() -> int | None:
    """Number of trainer processes if torchrun or srun started this one, else None."""
    place = launched()
    return place.processes if place else None


def rank() -> int:
    """Number of this process among the trainer processes; 0 for the only one."""
    return (launched() or ALONE).rank


def local_processes() -> int | None:
    """Number of trainer processes on this machine if torchrun started this one, else None."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return None if processes is None else int(processes)


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
