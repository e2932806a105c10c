"""Layers with a gated delta net over prefix trees in the place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from spell_megatron.training.delta_rule import PIECE, tree_convolution, tree_delta_rule
from spell_megatron.training.head_swap import heads_to_tokens, tokens_to_heads
from spell_megatron.training.policy import DeltaNet
from spell_megatron.training.row_memo import RowMemo
from spell_megatron.training.tree_levels import Forest, forest

_forests: RowMemo[int, Forest] = RowMemo(lambda end, width: forest(end, width, None if end.is_cuda else PIECE))


@dataclass(frozen=True)
class DeltaNetParts:
    """The linear layers that a gated delta net is made of."""

    in_proj: Any
    out_proj: Any


class TreeDeltaNet(MegatronModule):
    """A gated delta net with the place and the arguments of Megatron's self-attention.

    Tensor-parallel ranks have whole key heads with the value heads that share them. The rows of `in_proj` are, for one
    key head after the other: its queries, keys, values, gates, rates and decays; those of the convolution its queries,
    keys and values. So any number of ranks cuts them evenly. Context-parallel ranks swap tokens for heads before the
    convolution and back after the gated norm, so that each passes states along whole rows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DeltaNetParts,
        layer_number: int,
        sizes: DeltaNet,
        pg_collection: Any,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.tp_group, self._swapping = pg_collection.tp, pg_collection.cp
        ranks = self.tp_group.size()
        self._sizes, self._key_heads = sizes, sizes.key_heads // ranks // self._swapping.size()
        values = sizes.heads * sizes.value_dim
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            sizes.channels + values + 2 * sizes.heads,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.out_proj = submodules.out_proj(
            values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **common,
        )
        self.conv1d = _Weight(config, sizes.channels // ranks, 1, sizes.width, cut=True)
        self.out_norm = _Weight(config, sizes.value_dim, cut=False)
        self.dt_bias = _parameter(config, sizes.heads // ranks, cut=True)
        self.A_log = _parameter(config, sizes.heads // ranks, cut=True)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """hidden_states [tokens, 1, hidden] of this rank's tokens, attention_mask `end` [all tokens] -> the same
        shape, and no bias."""
        sizes, heads = self._sizes, self._key_heads
        trees = _forests.of(attention_mask, sizes.width)
        share = sizes.heads // sizes.key_heads
        key, value = sizes.key_dim, share * sizes.value_dim
        projected = self.in_proj(hidden_states)[0][:, 0]
        projected = self._to_heads(projected.unflatten(1, (heads * self._swapping.size(), -1)))
        mixed, gate, rate, decay = projected.split([2 * key + value, value, share, share], dim=2)
        mixed = tree_convolution(mixed.flatten(1), self._own(self.conv1d.weight), trees).unflatten(1, (heads, -1))
        queries, keys, values = mixed.split([key, key, value], dim=2)
        decay = F.softplus(decay.flatten(1).float() + self._own(self.dt_bias)) * -self._own(self.A_log).float().exp()
        output = tree_delta_rule(
            queries,
            keys,
            values.reshape(len(values), heads * share, sizes.value_dim),
            decay.index_select(0, trees.order),
            rate.flatten(1).sigmoid().index_select(0, trees.order),
            trees,
        ).index_select(0, trees.places)
        output = self._to_tokens(self._gated(output, gate.reshape_as(output)))
        return self.out_proj(output.flatten(1)[:, None])[0], None

    def _to_heads(self, x: Tensor) -> Tensor:
        """[own tokens, heads of all context-parallel ranks, ...] -> [all tokens, own heads, ...]."""
        return tokens_to_heads(x, self._swapping) if self._swapping.size() > 1 else x

    def _to_tokens(self, x: Tensor) -> Tensor:
        """The other way round."""
        return heads_to_tokens(x, self._swapping) if self._swapping.size() > 1 else x

    def _own(self, parameter: Tensor) -> Tensor:
        """The rows of a parameter that belong to this context-parallel rank's heads. The gradients of the ranks, which
        each have all rows, add up."""
        return parameter.chunk(self._swapping.size())[self._swapping.rank()]

    def _gated(self, output: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head, times SiLU of the gate, rounded as transformers does."""
        exact = output.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.config.layernorm_epsilon)
        return (self.out_norm.weight * exact.to(output.dtype) * F.silu(gate.float())).to(output.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As Megatron's default, which does not know that these parameters are cut."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = dict(self.named_parameters(recurse=False))
        own |= {"conv1d.weight": self.conv1d.weight, "out_norm.weight": self.out_norm.weight}
        entries = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in ("in_proj", "out_proj"):
            entries |= sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return entries


class _Weight(torch.nn.Module):
    """A module that is one parameter, so that its name ends as in other models."""

    def __init__(self, config: TransformerConfig, *shape: int, cut: bool) -> None:
        super().__init__()
        self.weight = _parameter(config, *shape, cut=cut)


def _parameter(config: TransformerConfig, *shape: int, cut: bool) -> torch.nn.Parameter:
    """A parameter that the tensor-parallel ranks cut along its first dimension, or that each has for its own heads.

    The norm of all gradients counts what is cut on every rank. Megatron adds up the gradients of parameters with the
    mark `sequence_parallel` over the ranks.
    """
    device = torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.ones(shape, dtype=config.params_dtype, device=device))
    if cut:
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    else:
        parameter.sequence_parallel = config.sequence_parallel
    return parameter


def delta_net_spec(sizes: DeltaNet, in_proj: Any, out_proj: Any) -> ModuleSpec:
    """What Megatron builds in the place of self-attention."""
    return ModuleSpec(module=TreeDeltaNet, params={"sizes": sizes}, submodules=DeltaNetParts(in_proj, out_proj))
