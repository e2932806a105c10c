"""Attention over prefix trees: the core attention of every layer.

A row of tokens holds a forest of prefix trees in depth-first order. `end[k]` is the end of the subtree of
token k, and the whole mask is: q attends to k iff k <= q < end[k].

On CPUs the mask is cut into rectangles (`attention_cpu`). On GPUs FlexAttention takes it as blocks (`attention_gpu`).

With context parallelism every rank holds a slice of the tokens. Before the attention they exchange slices of
tokens for slices of heads and back after it (Ulysses, arXiv:2309.14509), so that the attention itself sees
whole rows. Where there are more ranks than heads, groups of ranks do so among themselves: a group's attention
has the group's queries and, gathered, the keys and values of the whole row (`layout.context_split`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from spell_megatron.training.attention_cpu import Ranges, TreeAttentionOnCpu, heads_first, plan
from spell_megatron.training.attention_gpu import compiled_flex_attention, flex_block_mask
from spell_megatron.training.head_swap import heads_to_tokens, tokens_to_heads
from spell_megatron.training.layout import query_ranges
from spell_megatron.training.row_memo import RowMemo

_prepared: RowMemo[Ranges | None, Any] = RowMemo(
    lambda end, queries: flex_block_mask(end, queries) if end.is_cuda else plan(end, queries)
)
"""The plan or block mask of rows for some queries."""


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
    prepared = _prepared.of(end, queries)
    if not query.is_cuda:
        return TreeAttentionOnCpu.apply(query, key, value, prepared, scale)
    out = compiled_flex_attention()(
        *(heads_first(x) for x in (query, key, value)),
        block_mask=prepared,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return out[0].transpose(0, 1)


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
        query, key, value = (tokens_to_heads(x, swapping) for x in (query, key, value))
        queries = None
        if gathering:
            key, value = _gather_tokens(torch.stack([key, value]).transpose(0, 1), gathering).unbind(1)
            queries = query_ranges(attention_mask.numel(), gathering.rank(), gathering.size())
        out = tree_attention(query, key, value, attention_mask, self.scale, queries)
        return heads_to_tokens(out, swapping).flatten(1)[:, None]
