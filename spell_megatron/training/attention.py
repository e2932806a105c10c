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
whole rows.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from spell_megatron.training.layout import ulysses_groups

SMALL = 128
"""Neighbouring subtrees of at most this many tokens together share one call with an explicit mask: a call
on fewer tokens costs more in overhead than in arithmetic."""

FLEX_BLOCK = 128
"""Side of FlexAttention's mask blocks in tokens."""


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop): all of them, or causal, or as `mask` says."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    mask: Tensor | None
    """[q, k] bool, True where q attends to k."""
    first: bool
    """No earlier rectangle holds these queries (otherwise one holds each of them)."""

    @property
    def diagonal(self) -> bool:
        """Queries and keys are the same tokens. Every key is in one such rectangle, its first."""
        return self.q_start == self.k_start


def plan(end: Tensor) -> list[Rectangle]:
    """Cut the mask of a forest into disjoint rectangles that cover it.

    A run of tokens with one `end` is an unbranched piece of a tree: it is causal in itself, and all its
    descendants, which are contiguous, see all of it.

    Args:
        end: [tokens] integers, end of each token's subtree.
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
        rectangles.append(Rectangle(q_start, q_stop, k_start, k_stop, causal, mask, first))

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
    return rectangles


class _TreeAttentionOnCpu(torch.autograd.Function):
    """Flash attention over the rectangles of a plan. query [tokens, heads, head_dim], key and value
    [tokens, groups, head_dim]; the result has the shape and type of query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: list[Rectangle], scale: float
    ):
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
            torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
            for x in (query, key, value)
        )
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
            _put(grad_k[:, :, keys], dk, r.diagonal)
            _put(grad_v[:, :, keys], dv, r.diagonal)
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


def flex_block_mask(end: Tensor):
    """The mask of a forest as FlexAttention's blocks, from `end` alone: no [tokens, tokens] tensor.

    A block is needed iff its last subtree end lies past its first query, and full iff its first subtree end
    lies past its last query.

    Args:
        end: [tokens] integers, on the device of the attention.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = end.numel()
    blocks = -(-total // FLEX_BLOCK)
    padding = blocks * FLEX_BLOCK - total
    # Keys past the end of the row belong to no query; their blocks must not count as full.
    padded = torch.nn.functional.pad(end.long(), (0, padding), value=0).view(blocks, FLEX_BLOCK)
    last, first = padded.amax(1), padded.amin(1)
    block = torch.arange(blocks, device=end.device)
    query_block, key_block = block[:, None], block[None, :]
    needed = (key_block <= query_block) & (last[None, :] > query_block * FLEX_BLOCK)
    full = (key_block < query_block) & (first[None, :] >= (query_block + 1) * FLEX_BLOCK)
    partial = needed & ~full

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        indices = chosen.int().argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=(total, total)
    )


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


_prepared: deque[tuple[Tensor, Any]] = deque(maxlen=4)


def _prepare(end: Tensor) -> Any:
    """The plan or block mask of `end`, made once for all layers, forward and recomputed.

    Recompute hands a detached alias of `end` over, so rows are told apart by their memory; holding the
    tensor keeps that memory from being used again.
    """
    for known, prepared in _prepared:
        if known.data_ptr() == end.data_ptr() and known.shape == end.shape and known.device == end.device:
            return prepared
    prepared = flex_block_mask(end) if end.is_cuda else plan(end)
    _prepared.append((end, prepared))
    return prepared


def tree_attention(query: Tensor, key: Tensor, value: Tensor, end: Tensor, scale: float) -> Tensor:
    """Softmax attention in which q sees k iff k <= q < end[k].

    Args:
        query: [tokens, heads, head_dim].
        key, value: [tokens, groups, head_dim]; heads is a multiple of groups.
        end: [tokens] integers, end of each token's subtree. It must not be changed in place afterwards.
        scale: factor on the scores.

    Returns:
        [tokens, heads, head_dim], type of `query`.
    """
    prepared = _prepare(end)
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


class TreeAttention(MegatronModule):
    """Megatron's core attention, with `end` in the place of the attention mask."""

    def __init__(self, config, layer_number: int, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **unused: Any
    ) -> Tensor:
        """query [tokens, 1, heads, head_dim], key and value [tokens, 1, groups, head_dim] of this rank's
        tokens, attention_mask `end` [all tokens] -> [tokens, 1, heads * head_dim]."""
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        ranks = self.config.context_parallel_size
        if ranks == 1:
            return tree_attention(query, key, value, attention_mask, self.scale).flatten(1)[:, None]
        group = parallel_state.get_context_parallel_group()
        copies = ulysses_groups(query.size(1), key.size(1), ranks) // key.size(1)
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = (_tokens_to_heads(x, group) for x in (query, key, value))
        out = tree_attention(query, key, value, attention_mask, self.scale)
        return _heads_to_tokens(out, group).flatten(1)[:, None]
