"""How the trainer's processes are divided into groups. `training.layout` tells whether a model fits a layout."""

from __future__ import annotations

from collections.abc import Iterator

from spell_megatron.config.faults import Fault
from spell_megatron.config.schema import ParallelConfig

DENSE = ("tensor", "pipeline", "context")
EXPERT = ("expert", "expert_tensor", "pipeline")


def division_faults(parallel: ParallelConfig, processes: int) -> Iterator[Fault]:
    """Why this number of processes does not hold whole copies of the dense layers, or of the experts."""
    for names, ranks in ((DENSE, parallel.dense_ranks), (EXPERT, parallel.expert_ranks)):
        if processes % ranks:
            sizes = " x ".join(str(getattr(parallel, name)) for name in names)
            yield Fault(
                tuple(f"training.parallel.{name}" for name in ("processes", *names)),
                f"{processes} trainer processes cannot be divided into groups of {' x '.join(names)} = {sizes} = "
                f"{ranks}. Use a multiple of {ranks} processes, or another layout",
            )
