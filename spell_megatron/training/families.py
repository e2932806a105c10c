"""The supported families of models: what the fields of their config.json mean, and how their tensors are called.

A family that computes like these is added by an entry here and a line in `tests/families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Trait = bool | str
"""Something that holds for the whole family or for none of it, or the name of the field that says so. A model whose
config.json lacks the field does not have the trait."""

_LAYER = "model.layers.{layer}."

LLAMA_NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.layers.{layer}.input_layernorm.weight": (_LAYER + "input_layernorm.weight",),
    "decoder.layers.{layer}.self_attention.linear_qkv.weight": (
        _LAYER + "self_attn.q_proj.weight",
        _LAYER + "self_attn.k_proj.weight",
        _LAYER + "self_attn.v_proj.weight",
    ),
    "decoder.layers.{layer}.self_attention.linear_qkv.bias": (
        _LAYER + "self_attn.q_proj.bias",
        _LAYER + "self_attn.k_proj.bias",
        _LAYER + "self_attn.v_proj.bias",
    ),
    "decoder.layers.{layer}.self_attention.q_layernorm.weight": (_LAYER + "self_attn.q_norm.weight",),
    "decoder.layers.{layer}.self_attention.k_layernorm.weight": (_LAYER + "self_attn.k_norm.weight",),
    "decoder.layers.{layer}.self_attention.linear_proj.weight": (_LAYER + "self_attn.o_proj.weight",),
    "decoder.layers.{layer}.self_attention.linear_proj.bias": (_LAYER + "self_attn.o_proj.bias",),
    "decoder.layers.{layer}.pre_mlp_layernorm.weight": (_LAYER + "post_attention_layernorm.weight",),
    "decoder.layers.{layer}.mlp.linear_fc1.weight": (
        _LAYER + "mlp.gate_proj.weight",
        _LAYER + "mlp.up_proj.weight",
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.bias": (_LAYER + "mlp.gate_proj.bias", _LAYER + "mlp.up_proj.bias"),
    "decoder.layers.{layer}.mlp.linear_fc2.weight": (_LAYER + "mlp.down_proj.weight",),
    "decoder.layers.{layer}.mlp.linear_fc2.bias": (_LAYER + "mlp.down_proj.bias",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
"""Hugging Face names of each Megatron parameter, in the order in which Megatron joins them."""

_EXPERTS: Mapping[str, tuple[str, ...]] = {
    "decoder.layers.{layer}.mlp.router.weight": (_LAYER + "mlp.gate.weight",),
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        _LAYER + "mlp.experts.{expert}.gate_proj.weight",
        _LAYER + "mlp.experts.{expert}.up_proj.weight",
    ),
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight": (
        _LAYER + "mlp.experts.{expert}.down_proj.weight",
    ),
}

QWEN3_MOE_NAMES: Mapping[str, tuple[str, ...]] = {**LLAMA_NAMES, **_EXPERTS}

_MIXER, _LINEAR = "decoder.layers.{layer}.self_attention.", _LAYER + "linear_attn."

QWEN3_5_NAMES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_NAMES,
    _MIXER + "in_proj.weight": tuple(_LINEAR + f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
    _MIXER + "conv1d.weight": (_LINEAR + "conv1d.weight",),
    _MIXER + "dt_bias": (_LINEAR + "dt_bias",),
    _MIXER + "A_log": (_LINEAR + "A_log",),
    _MIXER + "out_norm.weight": (_LINEAR + "norm.weight",),
    _MIXER + "out_proj.weight": (_LINEAR + "out_proj.weight",),
}

_SHARED = "decoder.layers.{layer}.mlp.shared_experts."

WITHIN, ALONE = "model.language_model.", "model."
"""How names begin in a model that also sees images, and in a language model that stands alone."""
VISION = "model.visual."
"""How the names of a vision tower's tensors begin."""

QWEN3_5_MOE_NAMES: Mapping[str, tuple[str, ...]] = {
    **QWEN3_5_NAMES,
    **_EXPERTS,
    _SHARED + "linear_fc1.weight": tuple(_LAYER + f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")),
    _SHARED + "linear_fc2.weight": (_LAYER + "mlp.shared_expert.down_proj.weight",),
    _SHARED + "gate_weight": (_LAYER + "mlp.shared_expert_gate.weight",),
}

_EXPERT = _LAYER + "mlp.experts.{expert}."

GPT_OSS_NAMES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_NAMES,
    _MIXER + "core_attention.softmax_offset": (_LAYER + "self_attn.sinks",),
    "decoder.layers.{layer}.mlp.router.weight": (_LAYER + "mlp.router.weight",),
    "decoder.layers.{layer}.mlp.router.bias": (_LAYER + "mlp.router.bias",),
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight": (_EXPERT + "gate_up_proj",),
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.bias": (_EXPERT + "gate_up_proj_bias",),
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight": (_EXPERT + "down_proj",),
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.bias": (_EXPERT + "down_proj_bias",),
}
"""Checkpoints store each of the experts' tensors for all experts of a layer together; vLLM takes them one by one under
these names too."""


@dataclass(frozen=True)
class DeltaNets:
    """The fields of config.json that describe layers of gated delta nets."""

    key_heads: str
    heads: str
    """Heads of the values."""
    key_dim: str
    value_dim: str
    width: str
    """Tokens that the convolution sees."""


@dataclass(frozen=True)
class Experts:
    """The fields of config.json that describe a mixture of experts."""

    count: str
    per_token: str
    width: str
    """Width of an expert's feed-forward."""
    normalised: Trait
    """The weights of a token's experts sum to one."""
    dense_layers: str | None = None
    """Numbers of the layers without experts. None: there are none."""
    period: str | None = None
    """Only every so many layers one has experts. None: every layer has."""
    shared_width: str | None = None
    """Width of the feed-forward of an expert that all tokens go to, and that has a gate. None: there is none."""
    biased: bool = False
    """Router and experts have biases, and checkpoints hold the experts' matrices transposed, with the columns of gate
    and up by turns."""
    limit: str | None = None
    """Bound of the gates and of the ups, which are raised by one, in gates * sigmoid(1.702 gates) * ups. None: the
    feed-forward is SwiGLU."""


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from other models."""

    title: str
    """What users call these models."""
    names: Mapping[str, tuple[str, ...]]
    """Hugging Face names of each Megatron parameter; {layer} and {expert} stand for numbers in the whole model."""
    qkv_bias: Trait = False
    output_bias: Trait = False
    """Bias of the attention's output projection."""
    mlp_bias: Trait = False
    qk_norm: Trait = False
    """RMSNorm on every head's query and key."""
    window: tuple[str, str] | None = None
    """The field that asks for sliding-window attention, and the value that turns it off."""
    windows: str | None = None
    """The field with the width of the windows of those layers that layer_types calls "sliding_attention"."""
    sinks: bool = False
    """Each head has a learned score beside those of the tokens, which takes its share of the attention away."""
    experts: Experts | None = None
    delta_nets: DeltaNets | None = None
    """Layers that layer_types calls "linear_attention"."""
    output_gate: Trait = False
    """The query projection also makes a gate on the attention's output."""
    centred_norms: Trait = False
    """RMSNorms multiply by one more than their weights."""
    partial_rotary: bool = False
    """Rotary embeddings may turn a part of each head."""
    whole: str | None = None
    """model_type of models that hold such a language model beside a vision tower; None: there are none."""
    untrained: tuple[str, ...] = ()
    """How names of tensors begin that are no part of the language model: what predicts further tokens."""

    def layers(self, parameter: str) -> tuple[str, ...]:
        """Own names of the linear layers whose weights a Megatron parameter joins, such as q_proj, k_proj, v_proj."""
        return tuple(name.split(".")[-2] for name in self.names[parameter])

    @staticmethod
    def has(trait: Trait, hf_config: Any) -> bool:
        """Whether a model with this configuration has the trait."""
        return bool(getattr(hf_config, trait, False)) if isinstance(trait, str) else trait


_QWEN_WINDOW = ("use_sliding_window", "false")
_QWEN3_5: Mapping[str, Any] = {
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "qk_norm": True,
    "delta_nets": DeltaNets(
        key_heads="linear_num_key_heads",
        heads="linear_num_value_heads",
        key_dim="linear_key_head_dim",
        value_dim="linear_value_head_dim",
        width="linear_conv_kernel_dim",
    ),
    "output_gate": True,
    "centred_norms": True,
    "partial_rotary": True,
    "untrained": ("mtp.",),
}

FAMILIES = {
    "llama": Family(
        "Llama 1, 2, 3.x", LLAMA_NAMES, qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": Family("Mistral", LLAMA_NAMES, window=("sliding_window", "null")),
    "qwen2": Family("Qwen2, Qwen2.5", LLAMA_NAMES, qkv_bias=True, window=_QWEN_WINDOW),
    "qwen3": Family(
        "Qwen3", LLAMA_NAMES, qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, window=_QWEN_WINDOW
    ),
    "qwen3_moe": Family(
        "Qwen3 mixture of experts",
        QWEN3_MOE_NAMES,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window=_QWEN_WINDOW,
        experts=Experts(
            count="num_experts",
            per_token="num_experts_per_tok",
            width="moe_intermediate_size",
            normalised="norm_topk_prob",
            dense_layers="mlp_only_layers",
            period="decoder_sparse_step",
        ),
    ),
    "qwen3_5_text": Family("Qwen3.5 text", QWEN3_5_NAMES, **_QWEN3_5, whole="qwen3_5"),
    "qwen3_5_moe_text": Family(
        "Qwen3.5 text with a mixture of experts",
        QWEN3_5_MOE_NAMES,
        **_QWEN3_5,
        whole="qwen3_5_moe",
        experts=Experts(
            count="num_experts",
            per_token="num_experts_per_tok",
            width="moe_intermediate_size",
            normalised=True,
            shared_width="shared_expert_intermediate_size",
        ),
    ),
    "gpt_oss": Family(
        "gpt-oss",
        GPT_OSS_NAMES,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        windows="sliding_window",
        sinks=True,
        experts=Experts(
            count="num_local_experts",
            per_token="num_experts_per_tok",
            width="intermediate_size",
            normalised=True,
            biased=True,
            limit="swiglu_limit",
        ),
    ),
}
"""By config.json's `model_type`."""

WHOLES = {family.whole: model_type for model_type, family in FAMILIES.items() if family.whole}
"""The `model_type` of the language model within a model of a `model_type`."""


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(f"{family.title} ({model_type})" for model_type, family in FAMILIES.items())
