"""Attention over prefix trees on CPUs: calls of flash attention on rectangles of the mask.

The mask is cut into rectangles that are either full, causal, or small (`plan`). Each rectangle is one call of torch's
flash attention. Queries that meet several rectangles join the partial results by their log-sum-exp, and the backward
pass gives every rectangle the joined output and log-sum-exp, which makes its gradient exact (the identity behind
FlashAttention and ring attention, arXiv:2205.14135, arXiv:2310.01889). Nothing of size [tokens, tokens] exists, no key
is copied, and only what the forward pass keeps anyway (q, k, v, output, log-sum-exp) is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spell_megatron.training.windowed_plan import depths, windowed_blocks

SMALL = 128
"""Neighbouring subtrees of at most this many tokens together share one call with an explicit mask: a call
on fewer tokens costs more in overhead than in arithmetic."""

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


def plan(end: Tensor, queries: Ranges | None = None, window: int = 0) -> list[Rectangle]:
    """Cut the mask of a forest into disjoint rectangles that cover it.

    A run of tokens with one `end` is an unbranched piece of a tree: it is causal in itself, and all its
    descendants, which are contiguous, see all of it.

    Args:
        end: [tokens] integers, end of each token's subtree.
        queries: the tokens that are queries, if not all are. Then some keys may be in no rectangle, and no
            rectangle is called the first of its keys.
        window: tokens that a query sees, itself among them; 0: all. Below the depth of the forest no rectangle is
            called the first of its keys.
    """
    if window and window <= int(depths(end).max()):
        rectangles = [
            Rectangle(start, stop, first, last, False, mask, first=last == stop, first_of_keys=False)
            for start, stop, first, last, mask in windowed_blocks(end, window, SMALL)
        ]
    else:
        rectangles = _whole_plan(end)
    return rectangles if queries is None else _restricted(rectangles, queries)


def _whole_plan(end: Tensor) -> list[Rectangle]:
    """The rectangles of a mask without windows."""
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
    return rectangles


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


class TreeAttentionOnCpu(torch.autograd.Function):
    """Flash attention over the rectangles of a plan. query [queries, heads, head_dim], key and value
    [tokens, groups, head_dim]; the result has the shape and type of query.

    sinks [heads], or None, are scores beside those of the keys, of which nothing is read: they only add to the sum
    that normalises.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rectangles: list[Rectangle],
        scale: float,
        sinks: Tensor | None = None,
    ):
        tokens, heads, _ = query.shape
        out = torch.empty_like(query, dtype=torch.float32, memory_format=torch.contiguous_format)
        lse = torch.empty(tokens, heads, dtype=torch.float32)
        q, k, v, o = (heads_first(x) for x in (query, key, value, out))
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
            if r.mask is not None and not r.first:  # of a query that sees none of the keys the kernel says 0
                part_lse = part_lse.masked_fill(~r.mask.any(1)[:, None], -math.inf)
            if r.first:
                o[:, :, r.q_start : r.q_stop] = part
                rows.copy_(part_lse)
            else:
                weight = torch.sigmoid(part_lse - rows).transpose(0, 1)[None, :, :, None]
                o[:, :, r.q_start : r.q_stop].lerp_(part.float(), weight)
                torch.logaddexp(rows, part_lse, out=rows)
        if sinks is not None:
            out.mul_(torch.sigmoid(lse - sinks.float())[:, :, None])
            lse = torch.logaddexp(lse, sinks.float())
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.rectangles, ctx.scale = rectangles, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor):
        query, key, value, out, lse, sinks = ctx.saved_tensors
        grad_sinks = None
        if sinks is not None:  # the gradient of any score: its probability, times (0, what is read there, - its mean)
            share = torch.exp(sinks.float() - lse)
            grad_sinks = -(share * (grad_out * out).sum(-1, dtype=torch.float32)).sum(0).to(sinks.dtype)
        grads = tuple(
            torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        if not ctx.rectangles[0].first_of_keys:
            for x in grads[1:]:
                x.zero_()
        grad_q, grad_k, grad_v = (heads_first(x) for x in grads)
        q, k, v, o, g = (heads_first(x) for x in (query, key, value, out, grad_out))
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
        return *(x.to(query.dtype) for x in grads), None, None, grad_sinks


def _put(total: Tensor, part: Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)


def heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [1, heads, tokens, head_dim], a view."""
    return x.transpose(0, 1)[None]
