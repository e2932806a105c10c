"""Weights in MXFP4: numbers of four bits, each 32 of which share a power of two.

gpt-oss is published so: `experts.gate_up_proj_blocks` [experts, rows, groups, 16] holds two numbers in a byte, the
first in the lower half, and `experts.gate_up_proj_scales` [experts, rows, groups] the exponents plus 127.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BIAS = 127
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""


@dataclass(frozen=True)
class Packed:
    """A matrix of one expert within stored tensors of blocks and scales. Plain ones are transposed."""

    blocks: str
    scales: str
    expert: int
    shape: tuple[int, int]
    """Of the plain matrix."""


def packed_pairs(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names of stored tensors of blocks and of their scales."""
    known = set(names)
    for blocks in sorted(known):
        scales = blocks.removesuffix(_BLOCKS) + _SCALES
        if blocks.endswith(_BLOCKS) and scales in known:
            yield blocks, scales


def packed_parts(blocks: str, scales: str, shape: tuple[int, ...]) -> dict[str, Packed]:
    """Each expert's matrix by its name where each is stored by itself; `shape` is that of the blocks."""
    prefix, _, own = blocks.removesuffix(_BLOCKS).rpartition(".")
    experts, rows, groups, half = shape
    return {
        f"{prefix}.{expert}.{own}": Packed(blocks, scales, expert, (groups * 2 * half, rows))
        for expert in range(experts)
    }


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """The plain matrix [columns, rows] in bfloat16, exactly, of blocks [rows, groups, 16] and scales [rows, groups]."""
    table = torch.tensor([*_NUMBERS, *(-x for x in _NUMBERS)], dtype=torch.bfloat16)
    numbers = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    return torch.ldexp(numbers, scales.int()[..., None] - _BIAS).flatten(1).T
