"""What config.json says about the policy, worked out once and in one vocabulary for all supported families."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spell_megatron.errors import UserError
from spell_megatron.training.config_values import given_faults, value_faults
from spell_megatron.training.families import ALONE, FAMILIES, VISION, WHOLES, WITHIN, Experts, Family, supported


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of a layer with a gated delta net in the place of attention."""

    key_heads: int
    heads: int
    """A multiple of the key heads, whose consecutive heads share one."""
    key_dim: int
    value_dim: int
    width: int
    """Tokens that its convolution sees."""

    @property
    def channels(self) -> int:
        """Channels of its convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


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
    """Width of a dense layer's feed-forward; 0 if config.json knows none, because no layer is dense."""
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
    shared_ffn: int
    """Width of an expert that all tokens go to, and that has a gate; 0 if there is none."""
    biased_experts: bool
    """Router and experts have biases."""
    glu_limit: float | None
    """Bound in the experts' activation (`families.Experts.limit`); None: it is SwiGLU."""
    normalise_router: bool
    """Weights of the chosen experts sum to one."""
    moe_layers: tuple[bool, ...]
    """Per layer: is its feed-forward a mixture of experts?"""
    rotary_dim: int
    """Dimensions of each head that rotary embeddings turn."""
    output_gate: bool
    """The query projection also makes a gate on the attention's output."""
    centred_norms: bool
    """RMSNorms multiply by one more than their weights."""
    delta_net: DeltaNet | None
    """None: all layers have attention."""
    delta_layers: tuple[bool, ...]
    """Per layer: is a gated delta net in the place of its attention?"""
    sinks: bool
    """Each head has a learned score beside those of the tokens."""
    window: int
    """Tokens that the attention of some layers sees, the query's own among them; 0: all layers see all."""
    window_layers: tuple[bool, ...]
    """Per layer: does its attention see the window only?"""


@dataclass(frozen=True)
class PolicyModel:
    """The policy as its config.json describes it, and the type of its parameters."""

    hf_config: PretrainedConfig
    """Of the language model."""
    arch: Architecture
    dtype: torch.dtype
    whole: PretrainedConfig | None = None
    """Of the model that holds the language model beside a vision tower; None: it stands alone."""
    folder: Path | None = None
    """Where that config.json is."""

    @classmethod
    def load(cls, folder: Path | str, dtype: str | None = None) -> PolicyModel:
        """Read config.json of a local checkpoint folder, without running code from it.

        Args:
            dtype: type of the parameters, as torch names it; None: the one that config.json names.

        Raises:
            UserError: there is no such folder or file, it does not parse, a value is missing or cannot be, or the
                model is not supported.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(
                f"{folder} is not a Hugging Face checkpoint: it has no config.json. Set model.path to a "
                "folder with config.json, safetensors weights and a tokenizer, or to the whole name of a model of the "
                "Hugging Face hub (ORG/NAME)."
            )
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            kind = given.get("model_type")
            if kind in WHOLES:
                _refuse(_within_faults(kind, given.get("text_config")))
                kind, given = WHOLES[kind], given["text_config"]
            if kind in FAMILIES:
                _refuse(given_faults(FAMILIES[kind], given, CONFIG_MAPPING[kind].attribute_map))
            hf_config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # transformers raises many types for a bad file
            raise UserError(
                f"{path} cannot be read as a model configuration ({error}). Supported are {supported()}."
            ) from error
        return replace(cls.of(hf_config, dtype), folder=Path(folder))

    @classmethod
    def of(cls, hf_config: PretrainedConfig, dtype: str | None = None) -> PolicyModel:
        """The policy of a configuration that is read already. UserError as for `load`."""
        whole = hf_config if hf_config.model_type in WHOLES else None
        text = hf_config.get_text_config()
        if whole and bool(whole.tie_word_embeddings) != bool(text.tie_word_embeddings):
            _refuse(
                [
                    f"tie_word_embeddings is {whole.tie_word_embeddings}, and {text.tie_word_embeddings} in "
                    "text_config; vLLM reads the one and transformers the other"
                ]
            )
        arch = _architecture(text if whole else hf_config)
        named = getattr(torch, dtype) if dtype else text.dtype or hf_config.dtype
        policy = cls(text if whole else hf_config, arch, named or torch.float32, whole)
        _ = policy.rotary  # raises its errors
        return policy

    @property
    def family(self) -> Family:
        return FAMILIES[self.hf_config.model_type]

    def named(self, name: str) -> str:
        """The name that a tensor has in this model's checkpoints, from the one that it has in the family's."""
        return WITHIN + name.removeprefix(ALONE) if self.whole and name.startswith(ALONE) else name

    @property
    def untrained(self) -> tuple[str, ...]:
        """How the names of tensors begin that its checkpoints may hold beside the language model."""
        return (*self.family.untrained, *((VISION,) if self.whole else ()))

    @cached_property
    def rotary(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [rotary_dim / 2] in float32 and the factor on cosine and sine, as transformers
        defines them for the configured scaling (default, linear, llama3, yarn).

        Raises:
            UserError: a scaling whose frequencies depend on the length of each sequence, a rotation of a part of each
                head in a family that has none, or numbers that give none.
        """
        parameters = self.hf_config.rope_parameters
        if (kind := parameters["rope_type"]) not in ("default", "linear", "llama3", "yarn"):
            raise UserError(
                f"config.json asks for rotary embeddings of type {kind!r}. Supported are default, linear, llama3 "
                "and yarn; types whose frequencies change with the length of a sequence cannot be used when "
                "sequences of several lengths share a prefix."
            )
        part = parameters.get("partial_rotary_factor")
        if not self.family.partial_rotary and part not in (None, 1):
            raise UserError(
                f"config.json has partial_rotary_factor {part}. Rotary embeddings of a part of each head are not "
                f"supported, and the models of {self.family.title} have none. Remove it."
            )
        try:
            frequencies, factor = self._frequencies(kind)
            sound = bool((frequencies.isfinite() & (frequencies > 0)).all()) and 0 < factor < math.inf
            reason = "" if sound else "the frequencies are not all above 0 and finite"
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            _refuse([f"rope_parameters {parameters} give no rotary embedding ({reason})"])
        return frequencies.float(), float(factor)

    def _frequencies(self, kind: str) -> tuple[torch.Tensor, float]:
        # Models may be built on a device without memory, and transformers does not name the device everywhere.
        with torch.device("cpu"):
            if kind == "default":
                dim = self.arch.rotary_dim
                exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
                return 1.0 / self.hf_config.rope_parameters["rope_theta"] ** exponents, 1.0
            return ROPE_INIT_FUNCTIONS[kind](self.hf_config, device="cpu")


def _within_faults(kind: str, text: Any) -> Iterator[str]:
    """What is wrong with the language model that config.json describes within a model of type `kind`."""
    if not isinstance(text, dict):
        yield f"text_config is {text!r}; it must describe the language model"
    elif (own := text.get("model_type", WHOLES[kind])) != WHOLES[kind]:
        yield f"text_config has model_type {own!r}; in a model of type {kind!r} it must be {WHOLES[kind]!r}"


def _architecture(hf_config: PretrainedConfig) -> Architecture:
    """Sizes and traits of the model that `hf_config` describes. UserError if it is not supported."""
    model_type = hf_config.model_type
    if hf_config.get_text_config().model_type in FAMILIES.keys() - {model_type}:
        raise UserError(
            f"Models of type {model_type!r} hold a language model within a larger one. The language model alone can be "
            "trained: save it with transformers' AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto')"
            ".save_pretrained(NEW), and copy the tokenizer's files to NEW. NEW lacks the rest, such as a vision tower."
        )
    if model_type not in FAMILIES:
        raise UserError(f"Models of type {model_type!r} are not supported. Supported are {supported()}.")
    family = FAMILIES[model_type]
    _refuse(value_faults(family, hf_config))
    if hf_config.hidden_act != "silu":
        raise UserError(
            f"config.json has hidden_act {hf_config.hidden_act!r}; only 'silu' (SwiGLU) is supported, "
            f"which is what every released model of {family.title} uses."
        )
    _refuse_windows(family, hf_config)
    window_layers = tuple(kind == "sliding_attention" for kind in _layer_types(hf_config))
    layers = hf_config.num_hidden_layers
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    part = hf_config.rope_parameters.get("partial_rotary_factor") if family.partial_rotary else None
    return Architecture(
        layers=layers,
        hidden=hf_config.hidden_size,
        heads=hf_config.num_attention_heads,
        groups=hf_config.num_key_value_heads,
        head_dim=head_dim,
        ffn=getattr(hf_config, "intermediate_size", 0),
        vocabulary=hf_config.vocab_size,
        tied=hf_config.tie_word_embeddings,
        qkv_bias=family.has(family.qkv_bias, hf_config),
        output_bias=family.has(family.output_bias, hf_config),
        mlp_bias=family.has(family.mlp_bias, hf_config),
        qk_norm=family.has(family.qk_norm, hf_config),
        rotary_dim=head_dim if part is None else int(head_dim * part),
        output_gate=family.has(family.output_gate, hf_config),
        centred_norms=family.has(family.centred_norms, hf_config),
        delta_net=_delta_net(family, hf_config),
        delta_layers=tuple(kind == "linear_attention" for kind in _layer_types(hf_config)),
        sinks=family.sinks,
        window=getattr(hf_config, family.windows) if family.windows and any(window_layers) else 0,
        window_layers=window_layers,
        **(_experts(family.experts, hf_config) if family.experts else _NO_EXPERTS | {"moe_layers": (False,) * layers}),
    )


def _layer_types(hf_config: PretrainedConfig) -> list[str]:
    """What mixes the tokens in each layer, as config.json calls it."""
    return getattr(hf_config, "layer_types", None) or ["full_attention"] * hf_config.num_hidden_layers


def _delta_net(family: Family, hf_config: PretrainedConfig) -> DeltaNet | None:
    if family.delta_nets is None or "linear_attention" not in _layer_types(hf_config):
        return None
    return DeltaNet(**{size: getattr(hf_config, field) for size, field in asdict(family.delta_nets).items()})


def _refuse(faults: Iterable[str]) -> None:
    """UserError if there are faults of config.json."""
    if listed := "; ".join(faults):
        raise UserError(
            f"config.json cannot be used: {listed}. Correct it, or copy it again from where the model came from."
        )


def _refuse_windows(family: Family, hf_config: PretrainedConfig) -> None:
    field, off = family.window or ("", "")
    layer_types = getattr(hf_config, "layer_types", None)
    windowed = bool(field) and getattr(hf_config, field, None)
    known = {"full_attention"} | ({"linear_attention"} if family.delta_nets else set())
    known |= {"sliding_attention"} if family.windows else set()
    if any(kind not in known for kind in layer_types) if layer_types else windowed:
        changes = [f"set {field} to {off}"] if field else []
        changes += ["remove layer_types"] if layer_types else []
        raise UserError(
            "config.json asks for sliding-window attention, which is not supported in models of "
            f"{family.title}. To train the model with full attention, {' and '.join(changes)}."
        )


_NO_EXPERTS: dict[str, Any] = dict.fromkeys(("experts", "experts_per_token", "expert_ffn", "shared_ffn"), 0)
_NO_EXPERTS |= {"normalise_router": False, "biased_experts": False, "glu_limit": None}


def _experts(fields: Experts, hf_config: PretrainedConfig) -> dict[str, Any]:
    """The attributes of `Architecture` that describe a mixture of experts."""
    count, layers = getattr(hf_config, fields.count), range(hf_config.num_hidden_layers)
    dense = set((fields.dense_layers and getattr(hf_config, fields.dense_layers)) or ())
    period = getattr(hf_config, fields.period) if fields.period else 1
    moe_layers = tuple(bool(count) and i not in dense and (i + 1) % period == 0 for i in layers)
    if not any(moe_layers):
        return _NO_EXPERTS | {"moe_layers": moe_layers}
    per_token, normalised = getattr(hf_config, fields.per_token), Family.has(fields.normalised, hf_config)
    if normalised and per_token == 1:
        raise UserError(
            f"config.json has {fields.per_token} 1, and the weights of a token's experts sum to one: every expert then "
            "has weight 1 and the router learns nothing. Megatron-Core refuses it"
            + (f"; set {fields.normalised} to false." if isinstance(fields.normalised, str) else ".")
        )
    return {
        "experts": count,
        "experts_per_token": per_token,
        "expert_ffn": getattr(hf_config, fields.width),
        "shared_ffn": getattr(hf_config, fields.shared_width) if fields.shared_width else 0,
        "normalise_router": normalised,
        "biased_experts": fields.biased,
        "glu_limit": getattr(hf_config, fields.limit) if fields.limit else None,
        "moe_layers": moe_layers,
    }
