"""The layers of a Megatron-Core model: which of its own and of ours each is made of."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import Tensor

from spell_megatron.training.attention import TreeAttention
from spell_megatron.training.delta_net import delta_net_spec
from spell_megatron.training.moe import BiasedRouter, GroupedExperts, Router
from spell_megatron.training.policy import Architecture, DeltaNet, PolicyModel


class RMSNorm(torch.nn.Module):
    """RMSNorm for the plain-torch layer spec; unlike Megatron's wrapper it allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Megatron sums the gradients of parameters with this mark over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel

        self.centred = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:  # what is near 1 loses bits in bfloat16
            return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedSelfAttention(SelfAttention):
    """Megatron's attention with a gate on its output, also on more tensor-parallel ranks than key-value heads, and
    with rotary embeddings that scale a part of each head."""

    def __init__(self, *args: Any, scaled: tuple[int, float], **kwargs: Any) -> None:
        """scaled: (dimensions that rotary embeddings turn, their factor on the scores of these dimensions)."""
        super().__init__(*args, **kwargs)
        self._scaled = scaled

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, which gives such ranks the gates of all of their key-value head's queries."""
        query, key, value, gate = super().get_query_key_value_tensors(*args, **kwargs)
        ranks = gate.size(2) // query.size(2)
        turned, factor = self._scaled
        if factor != 1:
            query = torch.cat([query[..., :turned] * factor, query[..., turned:]], dim=-1)
        return query, key, value, gate.chunk(ranks, dim=2)[self.tp_group.rank() % ranks]


def layer_spec(transformer_config: TransformerConfig, policy: PolicyModel, use_te: bool) -> TransformerBlockSubmodules:
    """Megatron's spec of this pipeline stage with tree attention or gated delta nets, our RMSNorm and the family's
    biases. `use_te`: of the layers of transformer-engine."""
    arch = policy.arch
    spec = get_gpt_decoder_block_spec(transformer_config, use_transformer_engine=use_te, normalization="RMSNorm")
    if not use_te:
        spec.layer_norm = RMSNorm
    first = get_transformer_layer_offset(transformer_config)
    own: dict[tuple[int, bool], ModuleSpec] = {}
    for number, layer in enumerate(spec.layer_specs):  # layers of a kind are one object
        is_delta = arch.delta_layers[first + number]
        kind = id(layer), is_delta
        if kind not in own:
            own[kind] = deepcopy(layer)
            if arch.delta_net and is_delta:
                _put_delta_net(own[kind].submodules, arch.delta_net, use_te)
            else:
                _adapt_attention(own[kind].submodules, policy, use_te)
            _adapt_feed_forward(own[kind].submodules, arch, use_te)
        spec.layer_specs[number] = own[kind]
    return spec


def _put_delta_net(parts: TransformerLayerSubmodules, sizes: DeltaNet, use_te: bool) -> None:
    """Put a gated delta net in the place of the attention."""
    attention = parts.self_attention.submodules
    in_proj, parts.input_layernorm = attention.linear_qkv, RMSNorm
    if use_te:  # where one layer is the attention's norm and projection
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        in_proj, parts.input_layernorm = TEColumnParallelLinear, TENorm
    parts.self_attention = delta_net_spec(sizes, in_proj, attention.linear_proj)
    parts.sharded_state_dict_keys_map.pop("input_layernorm.", None)


def _adapt_attention(parts: TransformerLayerSubmodules, policy: PolicyModel, use_te: bool) -> None:
    arch = policy.arch
    attention = parts.self_attention.submodules
    attention.core_attention = TreeAttention
    if not use_te:
        parts.input_layernorm = RMSNorm
        if arch.qk_norm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if arch.output_gate:
        parts.self_attention.module = GatedSelfAttention
        # Where they turn whole heads, the factor is in the scale of the scores.
        scaled = arch.rotary_dim, policy.rotary[1] ** 2 if arch.rotary_dim < arch.head_dim else 1.0
        parts.self_attention.params = {**parts.self_attention.params, "scaled": scaled}
    if arch.output_bias:
        attention.linear_proj = _with_bias(attention.linear_proj)


def _adapt_feed_forward(parts: TransformerLayerSubmodules, arch: Architecture, use_te: bool) -> None:
    # A ModuleSpec in megatron-core 0.16, a functools.partial in 0.19.
    feed_forward = parts.mlp.submodules if isinstance(parts.mlp, ModuleSpec) else parts.mlp.keywords["submodules"]
    if not use_te:
        parts.pre_mlp_layernorm = RMSNorm
    if arch.mlp_bias:
        feed_forward.linear_fc1 = _with_bias(feed_forward.linear_fc1)
        feed_forward.linear_fc2 = _with_bias(feed_forward.linear_fc2)
    if isinstance(feed_forward, MoESubmodules):
        feed_forward.router = BiasedRouter if arch.biased_experts else Router
        # Checkpoints get the key that it has with transformer-engine: experts have no `mlp.linear_fc1`.
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        experts = feed_forward.experts  # its kind differs by version like that of parts.mlp
        if arch.biased_experts:
            inner = experts.submodules if isinstance(experts, ModuleSpec) else experts.keywords["submodules"]
            inner.linear_fc1 = _with_bias(inner.linear_fc1)
            inner.linear_fc2 = _with_one_bias(inner.linear_fc2)
        if _wants_grouped_experts(use_te):
            if isinstance(experts, ModuleSpec):
                experts.module = GroupedExperts
            else:
                feed_forward.experts = partial(GroupedExperts, **experts.keywords)


def _with_bias(linear: type) -> type:
    """The layer with a bias; Megatron's `add_bias_linear` gives one to attention and feed-forward at once."""

    class Biased(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    Biased.__name__ = Biased.__qualname__ = linear.__name__
    return Biased


def _with_one_bias(linear: type) -> type:
    """The same for the last layer of experts, whose outputs are summands: only one of the ranks that share an expert
    adds the bias, and all get its gradient."""

    biased: Any = _with_bias(linear)

    class Summand(biased):
        def own_bias(self, bias: Tensor | None = None) -> Tensor:
            """What this rank adds."""
            bias = self.bias if bias is None else bias
            return bias if parallel_state.get_expert_tensor_parallel_rank() == 0 else bias - bias.detach()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, bias = super().forward(*args, **kwargs)
            if isinstance(bias, list):  # of transformer-engine's grouped experts
                return output, [self.own_bias(each) for each in bias]
            return output.clone(), self.own_bias(bias)  # Megatron adds in place, which autograd forbids in a view

    Summand.__name__ = Summand.__qualname__ = linear.__name__
    return Summand


def _wants_grouped_experts(use_te: bool) -> bool:
    # On CPUs the products themselves take the time: one expert after the other is as fast or faster.
    return torch.cuda.is_available() and not use_te
