"""Attention over prefix trees on GPUs: FlexAttention with the mask as blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spell_megatron.training.windowed_plan import depths

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128
"""Side of FlexAttention's mask blocks in tokens."""


def flex_block_mask(end: Tensor, queries: Sequence[tuple[int, int]] | None = None, window: int = 0):
    """The mask of a forest as FlexAttention's blocks, from `end` alone: no [tokens, tokens] tensor.

    A block is needed iff its first key is not past its last query and its last subtree end is past its first
    query, and full iff its last key is not past its first query and its first subtree end is past its last query.
    With a window the blocks are those that the depths of their tokens allow besides.

    Args:
        end: [tokens] integers, on the device of the attention.
        queries: the tokens that are queries, if not all are.
        window: tokens of its path that a query sees, itself among them; 0: all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = end.numel()
    # Keys past the end of the row belong to no query; their blocks must not count as full.
    ends = _blocks(end.long(), 0)
    keys = _blocks(torch.arange(total, device=end.device), total)
    place = torch.cat([torch.arange(*r, device=end.device) for r in queries or [(0, total)]])
    # Queries past the end are never computed: any of the real ones will do.
    asking = _blocks(place, int(place[-1]))
    first_query, last_query = asking.amin(1)[:, None], asking.amax(1)[:, None]
    needed = (keys.amin(1) <= last_query) & (ends.amax(1) > first_query)
    full = (keys.amax(1) <= first_query) & (ends.amin(1) > last_query)
    depth = depths(end) if window else end
    if window:
        of_queries, of_keys = _blocks(depth[place], int(depth[place[-1]])), _blocks(depth, int(depth[-1]))
        needed &= of_queries.amin(1)[:, None] - of_keys.amax(1) < window
        full &= of_queries.amax(1)[:, None] - of_keys.amin(1) < window
    partial = needed & ~full

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        indices = chosen.int().argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query if queries is None else place[query]
        return (key <= at) & (at < end[key])

    def windowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query if queries is None else place[query]
        return (key <= at) & (at < end[key]) & (depth[at] - depth[key] < window)

    lengths = len(place), total
    return BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=windowed if window else mask,
        seq_lengths=lengths,
    )


def _blocks(x: Tensor, padding: int) -> Tensor:
    """[tokens] -> [blocks, FLEX_BLOCK]."""
    return torch.nn.functional.pad(x, (0, -len(x) % FLEX_BLOCK), value=padding).view(-1, FLEX_BLOCK)


def attend_in_blocks(heads: Sequence[Tensor], mask: BlockMask, scale: float, sinks: Tensor | None) -> Tensor:
    """Attention of queries, keys and values [1, heads or groups, tokens, head_dim] -> [1, heads, tokens, head_dim].

    sinks: [heads] scores beside those of the keys, of which nothing is read.
    """
    options = {"block_mask": mask, "scale": scale, "enable_gqa": heads[0].size(1) != heads[1].size(1)}
    if sinks is None:
        return compiled_flex_attention()(*heads, **options)
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = compiled_flex_attention()(*heads, **options, return_aux=AuxRequest(lse=True))
    return out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].to(out.dtype)


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
