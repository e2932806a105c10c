"""Attention over prefix trees: the core attention of every layer.

A row of tokens holds a forest of prefix trees in depth-first order. `end[k]` is the end of the subtree of
token k, and the whole mask is: q attends to k iff k <= q < end[k]. Where layers have a sliding window, q attends to
those of them that are fewer than so many tokens above it in its tree.

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
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from spell_megatron.training.attention_cpu import Ranges, TreeAttentionOnCpu, heads_first, plan
from spell_megatron.training.attention_gpu import attend_in_blocks, flex_block_mask
from spell_megatron.training.head_swap import heads_to_tokens, tokens_to_heads
from spell_megatron.training.layout import query_ranges
from spell_megatron.training.row_memo import RowMemo

_prepared: RowMemo[tuple[Ranges | None, int], Any] = RowMemo(
    lambda end, options: (flex_block_mask if end.is_cuda else plan)(end, *options)
)
"""The plan or block mask of rows for some queries and a window."""


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    scale: float,
    queries: Ranges | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which q sees k iff k <= q < end[k], and with a window iff also depth[q] - depth[k] < window.

    Args:
        query: [queries, heads, head_dim].
        key, value: [tokens, groups, head_dim]; heads is a multiple of groups.
        end: [tokens] integers, end of each token's subtree. It must not be changed in place afterwards.
        scale: factor on the scores.
        queries: the tokens that are queries, if not all are.
        window: tokens of its path that a query sees, itself among them; 0: all.
        sinks: [heads] scores beside those of the keys, of which nothing is read.

    Returns:
        [queries, heads, head_dim], type of `query`.
    """
    prepared = _prepared.of(end, (queries, window))
    if not query.is_cuda:
        return TreeAttentionOnCpu.apply(query, key, value, prepared, scale, sinks)
    heads = [heads_first(x) for x in (query, key, value)]
    return attend_in_blocks(heads, prepared, scale, sinks)[0].transpose(0, 1)


def _gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens / ranks, ...] of each rank's `layout.query_ranges` -> [tokens, ...] in the order of the row."""
    pieces = gather_from_sequence_parallel_region(x.contiguous(), group=group)
    pieces = pieces.view(group.size(), 2, -1, *x.shape[1:])  # of each rank one from the front, one from the back
    return torch.cat([pieces[:, 0].flatten(0, 1), pieces[:, 1].flip(0).flatten(0, 1)])


class TreeAttention(MegatronModule):
    """Megatron's core attention, with `end` in the place of the attention mask. Windows and learned scores (sinks) are
    as in Megatron's configuration."""

    softmax_offset: torch.nn.Parameter | None
    """Sinks of this rank's heads, under Megatron's name."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else 0
        sinks = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.nn.Parameter(
                torch.zeros(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
        self.register_parameter("softmax_offset", sinks)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **unused: Any) -> Tensor:
        """query [tokens, 1, heads, head_dim], key and value [tokens, 1, groups, head_dim] of this rank's
        tokens, attention_mask `end` [all tokens] -> [tokens, 1, heads * head_dim]."""
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        sinks, window = self.softmax_offset, self.window
        if self.config.context_parallel_size == 1:
            out = tree_attention(query, key, value, attention_mask, self.scale, None, window, sinks)
            return out.flatten(1)[:, None]
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
        if sinks is not None:  # each rank has all of them; their gradients add up
            sinks = sinks.chunk(swapping.size())[swapping.rank()]
        out = tree_attention(query, key, value, attention_mask, self.scale, queries, window, sinks)
        return heads_to_tokens(out, swapping).flatten(1)[:, None]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As Megatron's default, which does not know that the sinks are cut."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
