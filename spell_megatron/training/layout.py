"""Which parallel layouts a model can be trained in. Does not import Megatron, which takes seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version

from packaging.version import Version

from spell_megatron.config import ParallelConfig
from spell_megatron.errors import UserError
from spell_megatron.training.architecture import Architecture

LayoutFault = tuple[str, str]
"""(names under training.parallel, what is wrong with them and the remedy)."""


def layout_faults(arch: Architecture, parallel: ParallelConfig) -> Iterator[LayoutFault]:
    """Why the model cannot be cut so."""
    tensor, context = parallel.tensor, parallel.context
    if arch.heads % tensor:
        yield "tensor", f"{tensor} does not divide the model's {arch.heads} attention heads. Choose a divisor"
    elif arch.groups % tensor and tensor % arch.groups:
        yield (
            "tensor",
            f"{tensor} does not divide the model's {arch.groups} key-value heads, and is no multiple of them. "
            "Choose a divisor",
        )
    elif (rows := (arch.heads + 2 * arch.groups) * arch.head_dim) % tensor:
        # Key-value heads fewer than ranks: Megatron cuts the joined projection evenly all the same.
        yield "tensor", f"{tensor} does not divide the {rows} rows of the model's query-key-value projection. Lower it"
    else:
        try:
            ulysses_groups(arch.heads // tensor, max(1, arch.groups // tensor), context)
        except ValueError as error:
            yield (
                "context tensor",
                f"{context} does not fit the model: of each tensor-parallel rank, {error}. Choose a smaller "
                "context, or a smaller tensor",
            )
    if not all(arch.moe_layers) and arch.ffn % tensor:
        yield "tensor", f"{tensor} does not divide the width {arch.ffn} of the model's feed-forward. Choose a divisor"
    if arch.experts and arch.expert_ffn % parallel.expert_tensor:
        yield (
            "expert_tensor",
            f"{parallel.expert_tensor} does not divide the width {arch.expert_ffn} of the model's experts. Choose a "
            "divisor",
        )
    if arch.layers < parallel.pipeline:
        yield "pipeline", f"{parallel.pipeline} is more than the model's {arch.layers} layers. Lower it"
    if arch.experts and arch.experts % parallel.expert:
        yield "expert", f"{parallel.expert} does not divide the model's {arch.experts} experts. Choose a divisor"
    if not arch.experts and parallel.expert * parallel.expert_tensor > 1:
        yield "expert" if parallel.expert > 1 else "expert_tensor", "the model has no experts. Set it to 1"


def training_defects(arch: Architecture, parallel: ParallelConfig) -> Iterator[LayoutFault]:
    """Layouts in which the installed Megatron-Core trains wrongly."""
    installed = version("megatron-core")
    if (
        arch.experts
        and parallel.tensor > parallel.expert_tensor
        and parallel.expert == 1
        and Version(installed) < Version("0.17")
    ):
        yield (
            "tensor expert expert_tensor",
            f"megatron-core {installed} computes wrong gradients for mixture-of-experts models with "
            f"tensor = {parallel.tensor}, expert_tensor = {parallel.expert_tensor} and expert = 1. Set "
            "training.parallel.expert_tensor to the value of tensor, or expert above 1, or use "
            "megatron-core 0.19 (Python 3.12)",
        )


def refuse(faults: Iterator[LayoutFault]) -> None:
    """Raise UserError for the first fault, if there is one."""
    for keys, message in faults:
        raise UserError(f"training.parallel.{keys.split()[0]}: {message}.")


def ulysses_groups(heads: int, groups: int, ranks: int) -> int:
    """Key-value heads to spread over the context-parallel ranks: `groups`, or copies of them if they are too few.

    Raises:
        ValueError: the query heads do not divide evenly among the ranks and their key-value heads.
    """
    spread = math.lcm(groups, ranks)
    if heads % spread:
        raise ValueError(f"{heads} query heads with {groups} key-value heads cannot be spread over {ranks} ranks")
    return spread
