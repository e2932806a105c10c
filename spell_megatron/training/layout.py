"""Parallel layouts: which of them suit a model, and which tokens a context-parallel rank holds.

Does not import Megatron, which takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from spell_megatron.config.faults import Fault
from spell_megatron.config.schema import ParallelConfig
from spell_megatron.training.policy import Architecture


def layout_faults(arch: Architecture, parallel: ParallelConfig) -> Iterator[Fault]:
    """Why a model cannot be trained in a layout."""
    tensor, experts = parallel.tensor, parallel.expert_tensor
    if arch.heads % tensor:
        yield _fault("tensor", f"{tensor} does not divide the model's {arch.heads} attention heads. Choose a divisor")
    elif arch.groups % tensor and tensor % arch.groups:
        yield _fault(
            "tensor",
            f"{tensor} does not divide the model's {arch.groups} key-value heads, and is no multiple of them. "
            "Choose a divisor",
        )
    elif (rows := (arch.heads * (1 + arch.output_gate) + 2 * arch.groups) * arch.head_dim) % tensor:
        # Key-value heads fewer than ranks: Megatron cuts the joined projection evenly all the same.
        yield _fault(
            "tensor", f"{tensor} does not divide the {rows} rows of the model's query-key-value projection. Lower it"
        )
    if arch.delta_net:
        yield from _delta_net_faults(arch, arch.delta_net.key_heads, parallel)
    if not all(arch.moe_layers) and arch.ffn % tensor:
        yield _fault(
            "tensor", f"{tensor} does not divide the width {arch.ffn} of the model's feed-forward. Choose a divisor"
        )
    if arch.shared_ffn % tensor:
        yield _fault(
            "tensor",
            f"{tensor} does not divide the width {arch.shared_ffn} of the model's shared expert. Choose a divisor",
        )
    if arch.experts and arch.expert_ffn % experts:
        yield _fault(
            "expert_tensor",
            f"{experts} does not divide the width {arch.expert_ffn} of the model's experts. Choose a divisor",
        )
    if arch.layers < parallel.pipeline:
        yield _fault("pipeline", f"{parallel.pipeline} is more than the model's {arch.layers} layers. Lower it")
    if arch.experts and arch.experts % parallel.expert:
        yield _fault(
            "expert", f"{parallel.expert} does not divide the model's {arch.experts} experts. Choose a divisor"
        )
    if not arch.experts and parallel.expert * experts > 1:
        yield _fault("expert" if parallel.expert > 1 else "expert_tensor", "the model has no experts. Set it to 1")


def _delta_net_faults(arch: Architecture, key_heads: int, parallel: ParallelConfig) -> Iterator[Fault]:
    tensor, context = parallel.tensor, parallel.context
    if key_heads % tensor:
        yield _fault(
            "tensor",
            f"{tensor} does not divide the {key_heads} key heads of the model's linear layers. Choose a divisor",
        )
    elif key_heads // tensor % context:
        yield _fault(
            "context",
            f"{context} does not divide the {key_heads // tensor} key heads of the model's linear layers on a "
            "tensor-parallel rank. Choose a divisor",
        )
    if context_split(arch, parallel)[1] > 1:
        yield _fault(
            "context",
            f"{context} ranks are more than can swap tokens for the {arch.heads // tensor} attention heads of a "
            "tensor-parallel rank, and the model's linear layers need whole rows. Lower it",
        )


def _fault(name: str, message: str) -> Fault:
    return Fault.of(f"training.parallel.{name} model.path", message)


def context_split(arch: Architecture, parallel: ParallelConfig) -> tuple[int, int]:
    """How the context-parallel ranks share the attention: (ranks that swap tokens for heads, such groups).

    As many ranks as the heads of a tensor-parallel rank allow swap tokens for heads (Ulysses,
    arXiv:2309.14509), with copies of key-value heads that are too few. If there are more ranks, each group
    keeps its own queries and gathers the keys and values of the others.
    """
    heads, groups = arch.heads // parallel.tensor, max(1, arch.groups // parallel.tensor)
    fitting = [
        ranks
        for ranks in range(1, parallel.context + 1)
        if parallel.context % ranks == 0 and heads % math.lcm(groups, ranks) == 0
    ]
    return fitting[-1], parallel.context // fitting[-1]


def context_levels(arch: Architecture, parallel: ParallelConfig) -> list[int] | None:
    """`context_split` as Megatron's hierarchical_context_parallel_sizes: None if one group is enough."""
    swapping, groups = context_split(arch, parallel)
    return [swapping, groups] if groups > 1 else None


def query_ranges(length: int, group: int, groups: int) -> list[tuple[int, int]]:
    """Positions [start, stop) of a row that one of `groups` groups of context-parallel ranks holds, ascending.

    The row is cut into 2 groups pieces and each group takes one from the front and one from the back, because
    tokens at the back attend to more. `length` is a multiple of 2 groups, if there are several.
    """
    if groups == 1:
        return [(0, length)]
    piece = length // (2 * groups)
    return [(i * piece, (i + 1) * piece) for i in (group, 2 * groups - 1 - group)]


def context_positions(length: int, rank: int, swapping: int, groups: int) -> np.ndarray:
    """Positions [length / ranks] of a row that a context-parallel rank holds, ascending.

    Args:
        length: of the row, a multiple of the ranks, and of twice as many if there are several groups.
        rank: in the context-parallel group, whose consecutive ranks swap tokens for heads.
        swapping, groups: of `context_split`.
    """
    held = [np.arange(start, stop) for start, stop in query_ranges(length, rank // swapping, groups)]
    return np.split(np.concatenate(held), swapping)[rank % swapping]
