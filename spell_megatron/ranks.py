"""Which of the trainer processes this one is: the environment of torchrun and srun, read in one place."""

from __future__ import annotations

import os


def launched_processes() -> int | None:
    """Number of trainer processes if torchrun or srun started this one, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:  # a bare batch script has no step
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    return None


def rank() -> int:
    """Number of this process among the trainer processes; 0 for the only one."""
    if launched_processes() is None:
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
