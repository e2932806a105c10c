"""What config.json says about the policy, worked out once and in one vocabulary for all supported families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spell_megatron.errors import UserError

FAMILIES = {
    "llama": "Llama 1, 2, 3.x",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 mixture of experts",
}
"""Supported values of config.json's model_type."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and traits that tell one supported model from another."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key-value heads."""
    head_dim: int
    ffn: int
    """Width of a dense layer's feed-forward."""
    vocabulary: int
    tied: bool
    """The vocabulary head is the embedding."""
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm on every head's query and key."""
    experts: int
    """Experts per mixture-of-experts layer; 0 for dense models."""
    experts_per_token: int
    expert_ffn: int
    normalise_router: bool
    """Weights of the chosen experts sum to one."""
    moe_layers: tuple[bool, ...]
    """Per layer: is its feed-forward a mixture of experts?"""


@dataclass(frozen=True)
class PolicyModel:
    """The policy as its config.json describes it, and the type of its parameters."""

    hf_config: PretrainedConfig
    arch: Architecture
    dtype: torch.dtype

    @classmethod
    def load(cls, folder: Path | str, dtype: str | None = None) -> PolicyModel:
        """Read config.json of a local checkpoint folder, without running code from it.

        Args:
            dtype: type of the parameters, as torch names it; None: the one that config.json names.

        Raises:
            UserError: there is no such folder or file, it does not parse, or the model is not supported.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(
                f"{folder} is not a Hugging Face checkpoint: it has no config.json. Set model.path to a local "
                "folder with config.json, safetensors weights and a tokenizer."
            )
        try:
            hf_config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many types for a bad file
            raise UserError(
                f"{path} cannot be read as a model configuration ({error}). Supported are {_supported()}."
            ) from error
        return cls.of(hf_config, dtype)

    @classmethod
    def of(cls, hf_config: PretrainedConfig, dtype: str | None = None) -> PolicyModel:
        """The policy of a configuration that is read already. UserError if the model is not supported."""
        named = getattr(torch, dtype) if dtype else hf_config.dtype
        return cls(hf_config, _architecture(hf_config), named or torch.float32)

    @cached_property
    def rotary(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [head_dim / 2] in float32 and the factor on cosine and sine, as transformers
        defines them for the configured scaling (default, linear, llama3, yarn).

        Raises:
            UserError: a scaling whose frequencies depend on the length of each sequence.
        """
        parameters = self.hf_config.rope_parameters
        kind = parameters["rope_type"]
        # Models may be built on a device without memory, and transformers does not name the device everywhere.
        with torch.device("cpu"):
            if kind == "default":
                dim = self.arch.head_dim
                return 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
            if kind not in ("linear", "llama3", "yarn"):
                raise UserError(
                    f"config.json asks for rotary embeddings of type {kind!r}. Supported are default, linear, llama3 "
                    "and yarn; types whose frequencies change with the length of a sequence cannot be used when "
                    "sequences of several lengths share a prefix."
                )
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](self.hf_config, device="cpu")
        return frequencies.float(), float(factor)


def _architecture(hf_config: PretrainedConfig) -> Architecture:
    """Sizes and traits of the model that `hf_config` describes.

    Raises:
        UserError: the family, or an option of it, is not supported.
    """
    family = hf_config.model_type
    if family not in FAMILIES:
        raise UserError(f"Models of type {family!r} are not supported. Supported are {_supported()}.")
    if hf_config.hidden_act != "silu":
        raise UserError(
            f"config.json has hidden_act {hf_config.hidden_act!r}; only 'silu' (SwiGLU) is supported, "
            f"which is what every released model of {FAMILIES[family]} uses."
        )
    layer_types = getattr(hf_config, "layer_types", None)
    windowed = getattr(hf_config, "use_sliding_window", False)
    if any(kind != "full_attention" for kind in layer_types) if layer_types else windowed:
        raise UserError(
            "config.json asks for sliding-window attention, which is not supported. Set "
            "use_sliding_window to false and remove layer_types if the model is to be trained with full "
            "attention."
        )
    attention_bias = getattr(hf_config, "attention_bias", False)
    experts = hf_config.num_experts if family == "qwen3_moe" else 0
    layers = hf_config.num_hidden_layers
    if experts:
        dense = set(hf_config.mlp_only_layers or ())
        step = hf_config.decoder_sparse_step
        moe_layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    else:
        moe_layers = (False,) * layers
    if any(moe_layers) and hf_config.norm_topk_prob and hf_config.num_experts_per_tok == 1:
        raise UserError(
            "config.json has num_experts_per_tok 1 and norm_topk_prob true: every expert then has weight 1 and the "
            "router learns nothing. Megatron-Core refuses it; set norm_topk_prob to false."
        )
    return Architecture(
        layers=layers,
        hidden=hf_config.hidden_size,
        heads=hf_config.num_attention_heads,
        groups=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
        ffn=hf_config.intermediate_size,
        vocabulary=hf_config.vocab_size,
        tied=hf_config.tie_word_embeddings,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and hf_config.mlp_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=experts if any(moe_layers) else 0,
        experts_per_token=hf_config.num_experts_per_tok if experts else 0,
        expert_ffn=hf_config.moe_intermediate_size if experts else 0,
        normalise_router=bool(experts and hf_config.norm_topk_prob),
        moe_layers=moe_layers,
    )


def _supported() -> str:
    return ", ".join(f"{name} ({model_type})" for model_type, name in FAMILIES.items())
