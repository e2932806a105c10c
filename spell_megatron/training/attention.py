"""Attention over prefix trees: the core attention of every layer.

A row of tokens holds a forest of prefix trees in depth-first order. `end[k]` is the end of the subtree of
token k, and the whole mask is: q attends to k iff k <= q < end[k].

On CPUs the mask is cut into rectangles that are either full, causal, or small (`plan`). Each rectangle is one
call of torch's flash attention; queries that meet several rectangles join the partial results by their
log-sum-exp, and the backward pass gives every rectangle the joined output and log-sum-exp, which makes its
gradient exact (the identity behind FlashAttention and ring attention, arXiv:2205.14135, arXiv:2310.01889).
Nothing of size [tokens, tokens] exists, no key is copied, and only what the forward pass keeps anyway
(q, k, v, output, log-sum-exp) is saved. On GPUs FlexAttention takes the same mask as blocks.

With context parallelism every rank holds a slice of the tokens. Before the attention they exchange slices of
tokens for slices of heads and back after it (Ulysses, arXiv:2309.14509), so that the attention itself sees
whole rows. Where there are more ranks than heads, groups of ranks do so among themselves: a group's attention
has the group's queries and, gathered, the keys and values of the whole row (`layout.context_split`).
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from spell_megatron.training.layout import query_ranges

SMALL = 128
"""Neighbouring subtrees of at most this many tokens together share one call with an explicit mask: a call
on fewer tokens costs more in overhead than in arithmetic."""

FLEX_BLOCK = 128
"""Side of FlexAttention's mask blocks in tokens."""

Ranges = Sequence[tuple[int, int]]
"""Positions [start, stop) of a row, ascending."""


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop): all of them, or causal, or as `mask` says.

    Queries count among those that are there, keys in the whole row.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    mask: Tensor | None
    """[q, k] bool, True where q attends to k."""
    first: bool
    """No earlier rectangle holds these queries (otherwise one holds each of them)."""
    first_of_keys: bool
    """The same for the keys."""


def plan(end: Tensor, queries: Ranges | None = None) -> list[Rectangle]:
    """Cut the mask of a forest into disjoint rectangles that cover it.

    A run of tokens with one `end` is an unbranched piece of a tree: it is causal in itself, and all its
    descendants, which are contiguous, see all of it.

    Args:
        end: [tokens] integers, end of each token's subtree.
        queries: the tokens that are queries, if not all are. Then some keys may be in no rectangle, and no
            rectangle is called the first of its keys.
    """
    ends = end.cpu().numpy()
    total = len(ends)
    run_stops = np.append(np.flatnonzero(np.diff(ends)) + 1, total)
    stop_of_run = np.repeat(run_stops, np.diff(run_stops, prepend=0))
    seen = np.zeros(total, dtype=bool)
    rectangles = []

    def add(q_start: int, q_stop: int, k_start: int, k_stop: int, causal: bool, mask: Tensor | None) -> None:
        first = not bool(seen[q_start])
        seen[q_start:q_stop] = True
        # Every key is in one rectangle whose queries are the same tokens, and that is its first.
        rectangles.append(Rectangle(q_start, q_stop, k_start, k_stop, causal, mask, first, q_start == k_start))

    start = 0
    while start < total:
        stop = int(ends[start])
        if stop - start <= SMALL:
            # A rectangle is either first for all of its queries or for none.
            while stop < total and ends[stop] - start <= SMALL and seen[stop] == seen[start]:
                stop = int(ends[stop])
            if stop_of_run[start] >= stop:
                add(start, stop, start, stop, True, None)
            else:
                positions = np.arange(start, stop)
                mask = positions[:, None] < ends[None, start:stop]
                mask &= positions[:, None] >= positions[None, :]
                add(start, stop, start, stop, False, torch.from_numpy(mask))
            start = stop
        else:
            branching = int(stop_of_run[start])
            add(start, branching, start, branching, True, None)
            if stop > branching:
                add(branching, stop, start, branching, False, None)
            start = branching
    return rectangles if queries is None else _restricted(rectangles, queries)


def _restricted(rectangles: list[Rectangle], queries: Ranges) -> list[Rectangle]:
    """The parts of rectangles whose queries are in some ranges."""
    parts = []
    for r in rectangles:
        before = 0  # queries in the ranges before this one
        for begin, stop in queries:
            low, high = max(r.q_start, begin), min(r.q_stop, stop)
            if low < high:
                part = r._replace(q_start=before + low - begin, q_stop=before + high - begin, first_of_keys=False)
                if r.mask is not None:
                    part = part._replace(mask=r.mask[low - r.q_start : high - r.q_start])
                elif r.causal:
                    if low > r.q_start:
                        parts.append(part._replace(k_stop=low, causal=False))
                        part = part._replace(first=False)
                    part = part._replace(k_start=low, k_stop=high)
                parts.append(part)
            before += stop - begin
    return parts


class _TreeAttentionOnCpu(torch.autograd.Function):
    """Flash attention over the rectangles of a plan. query [queries, heads, head_dim], key and value
    [tokens, groups, head_dim]; the result has the shape and type of query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: list[Rectangle], scale: float):
        tokens, heads, _ = query.shape
        out = torch.empty_like(query, dtype=torch.float32, memory_format=torch.contiguous_format)
        lse = torch.empty(tokens, heads, dtype=torch.float32)
        q, k, v, o = (_heads_first(x) for x in (query, key, value, out))
        for r in rectangles:
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, r.q_start : r.q_stop],
                k[:, :, r.k_start : r.k_stop],
                v[:, :, r.k_start : r.k_stop],
                is_causal=r.causal,
                attn_mask=_additive(r.mask, query.dtype),
                scale=scale,
            )
            rows = lse[r.q_start : r.q_stop]
            part_lse = part_lse[0].transpose(0, 1)
            if r.first:
                o[:, :, r.q_start : r.q_stop] = part
                rows.copy_(part_lse)
            else:
                weight = torch.sigmoid(part_lse - rows).transpose(0, 1)[None, :, :, None]
                o[:, :, r.q_start : r.q_stop].lerp_(part.float(), weight)
                torch.logaddexp(rows, part_lse, out=rows)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rectangles, ctx.scale = rectangles, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(
            torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        if not ctx.rectangles[0].first_of_keys:
            for x in grads[1:]:
                x.zero_()
        grad_q, grad_k, grad_v = (_heads_first(x) for x in grads)
        q, k, v, o, g = (_heads_first(x) for x in (query, key, value, out, grad_out))
        lse = lse.transpose(0, 1)[None]
        for r in ctx.rectangles:
            queries, keys = slice(r.q_start, r.q_stop), slice(r.k_start, r.k_stop)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                o[:, :, queries],
                lse[:, :, queries],
                0.0,
                r.causal,
                attn_mask=_additive(r.mask, query.dtype),
                scale=ctx.scale,
            )
            _put(grad_q[:, :, queries], dq, r.first)
            _put(grad_k[:, :, keys], dk, r.first_of_keys)
            _put(grad_v[:, :, keys], dv, r.first_of_keys)
        return *(x.to(query.dtype) for x in grads), None, None


def _put(total: Tensor, part: Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [1, heads, tokens, head_dim], a view."""
    return x.transpose(0, 1)[None]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)


def flex_block_mask(end: Tensor, queries: Ranges | None = None):
    """The mask of a forest as FlexAttention's blocks, from `end` alone: no [tokens, tokens] tensor.

    A block is needed iff its first key is not past its last query and its last subtree end is past its first
    query, and full iff its last key is not past its first query and its first subtree end is past its last query.

    Args:
        end: [tokens] integers, on the device of the attention.
        queries: the tokens that are queries, if not all are.
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
    partial = needed & ~full

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        indices = chosen.int().argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query if queries is None else place[query]
        return (key <= at) & (at < end[key])

    lengths = len(place), total
    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=lengths
    )


def _blocks(x: Tensor, padding: int) -> Tensor:
    """[tokens] -> [blocks, FLEX_BLOCK]."""
    return torch.nn.functional.pad(x, (0, -len(x) % FLEX_BLOCK), value=padding).view(-1, FLEX_BLOCK)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


_prepared: deque[tuple[Tensor, Ranges | None, Any]] = deque(maxlen=4)


def _prepare(end: Tensor, queries: Ranges | None) -> Any:
    """The plan or block mask of `end`, made once for all layers, forward and recomputed.

    Recompute hands a detached alias of `end` over, so rows are told apart by their memory; holding the
    tensor keeps that memory from being used again.
    """
    for known, asking, prepared in _prepared:
        same_memory = known.data_ptr() == end.data_ptr() and known.device == end.device
        if same_memory and known.shape == end.shape and asking == queries:
            return prepared
    prepared = flex_block_mask(end, queries) if end.is_cuda else plan(end, queries)
    _prepared.append((end, queries, prepared))
    return prepared


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, end: Tensor, scale: float, queries: Ranges | None = None
) -> Tensor:
    """Softmax attention in which q sees k iff k <= q < end[k].

    Args:
        query: [queries, heads, head_dim].
        key, value: [tokens, groups, head_dim]; heads is a multiple of groups.
        end: [tokens] integers, end of each token's subtree. It must not be changed in place afterwards.
        scale: factor on the scores.
        queries: the tokens that are queries, if not all are.

    Returns:
        [queries, heads, head_dim], type of `query`.
    """
    prepared = _prepare(end, queries)
    if not query.is_cuda:
        return _TreeAttentionOnCpu.apply(query, key, value, prepared, scale)
    out = _compiled_flex_attention()(
        *(_heads_first(x) for x in (query, key, value)),
        block_mask=prepared,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return out[0].transpose(0, 1)


def _tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens / ranks, heads, d] -> [tokens, heads / ranks, d]."""
    ranks = group.size()
    tokens, heads, d = x.shape
    parts = x.view(tokens, ranks, heads // ranks, d).transpose(0, 1).contiguous()
    return all_to_all(group, parts.flatten(0, 1))


def _heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, heads / ranks, d] -> [tokens / ranks, heads, d]."""
    ranks = group.size()
    tokens, heads, d = x.shape
    parts = all_to_all(group, x.contiguous()).view(ranks, tokens // ranks, heads, d)
    return parts.transpose(0, 1).reshape(tokens // ranks, ranks * heads, d)


def _gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens / ranks, ...] of each rank's `layout.query_ranges` -> [tokens, ...] in the order of the row."""
    pieces = gather_from_sequence_parallel_region(x.contiguous(), group=group)
    pieces = pieces.view(group.size(), 2, -1, *x.shape[1:])  # of each rank one from the front, one from the back
    return torch.cat([pieces[:, 0].flatten(0, 1), pieces[:, 1].flip(0).flatten(0, 1)])


class TreeAttention(MegatronModule):
    """Megatron's core attention, with `end` in the place of the attention mask."""

    def __init__(self, config, layer_number: int, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **unused: Any) -> Tensor:
        """query [tokens, 1, heads, head_dim], key and value [tokens, 1, groups, head_dim] of this rank's
        tokens, attention_mask `end` [all tokens] -> [tokens, 1, heads * head_dim]."""
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.config.context_parallel_size == 1:
            return tree_attention(query, key, value, attention_mask, self.scale).flatten(1)[:, None]
        swapping, gathering = parallel_state.get_context_parallel_group(), None
        if self.config.hierarchical_context_parallel_sizes:  # more ranks than heads
            swapping, gathering = parallel_state.get_hierarchical_context_parallel_groups()
        copies = math.lcm(key.size(1), swapping.size()) // key.size(1)
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = (_tokens_to_heads(x, swapping) for x in (query, key, value))
        queries = None
        if gathering:
            key, value = _gather_tokens(torch.stack([key, value]).transpose(0, 1), gathering).unbind(1)
            queries = query_ranges(attention_mask.numel(), gathering.rank(), gathering.size())
        out = tree_attention(query, key, value, attention_mask, self.scale, queries)
        return _heads_to_tokens(out, swapping).flatten(1)[:, None]
