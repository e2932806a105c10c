"""What vLLM makes of a model's config.json, where that is not what the trainer and transformers make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.preflight.findings import Findings

if TYPE_CHECKING:
    from spell_megatron.training.policy import PolicyModel


@dataclass(frozen=True)
class Option:
    """A field of config.json that changes what vLLM computes, but not what the trainer does, or the other way round.

    Attributes:
        families: the model types for which it does; (): for all.
        effect: what vLLM does.
        neutral: the value with which both compute the same, as nothing, null, false and 0 do; if it is true, false
            and 0 are not neutral.
        same: another name of that value.
    """

    field: str
    families: tuple[str, ...]
    effect: str
    neutral: Any = None
    same: Any = None


_LLAMA, _QWEN = ("llama", "mistral"), ("qwen2", "qwen3", "qwen3_moe")
_QWEN3_5 = ("qwen3_5_text", "qwen3_5_moe_text")
_GPT_OSS = ("gpt_oss",)
OPTIONS = (
    Option("attention_bias", ("qwen3", "qwen3_moe"), "vLLM has no bias on the attention's output (o_proj.bias)"),
    Option("attention_bias", ("mistral",), "vLLM adds biases to the attention"),
    Option("mlp_bias", ("mistral",), "vLLM adds biases to the feed-forward"),
    Option("bias", _LLAMA, "vLLM adds biases to the attention"),
    Option("logit_scale", _LLAMA, "vLLM scales the logits", 1.0),
    Option("sliding_window", ("llama",), "vLLM's attention sees a window only"),
    Option("llama_4_scaling", ("mistral",), "vLLM scales the queries by their positions"),
    Option("ada_rms_norm_t_cond", ("mistral",), "vLLM adds layers"),
    Option("qk_norm", ("qwen2",), "vLLM adds norms to queries and keys"),
    Option("dual_chunk_attention_config", _QWEN, "vLLM's attention goes over two chunks"),
    Option("shared_expert_intermediate_size", ("qwen3_moe",), "vLLM adds a shared expert"),
    Option("attention_bias", _QWEN3_5, "vLLM has no biases in the attention"),
    Option("qkv_bias", _QWEN3_5, "vLLM adds biases to the attention"),
    Option("layer_scale", _QWEN3_5, "vLLM scales what layers add"),
    Option("attn_output_gate", _QWEN3_5, "vLLM has no gate on the attention's output", True),
    Option("norm_topk_prob", _QWEN3_5, "the weights of a token's experts do not sum to one in vLLM", True),
    Option("output_gate_type", _QWEN3_5, "vLLM's linear layers have another gate", "silu", "swish"),
    Option("attention_bias", _GPT_OSS, "vLLM adds biases to the attention", True),
    Option("rms_norm_eps", _GPT_OSS, "vLLM's norms add 1e-05 to the mean square", 1e-5),
    Option("swiglu_limit", _GPT_OSS, "vLLM's experts bound gates and ups by 7", 7.0),
)
ROTARY_OPTIONS = ("rope_dim", "mrope_section", "use_fope")
"""Fields of the rope scaling that vLLM alone reads."""

QUANTIZATION_FILE = "hf_quant_config.json"
"""Where old releases of ModelOpt describe quantised weights. vLLM reads it if config.json does not."""

LENGTH_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""vLLM takes the smallest of them for the model's positions."""


def check_engine_model(found: Findings, folder: Path, policy: PolicyModel) -> None:
    """vLLM serves this model, and computes what the trainer does."""
    for message in (*_class_faults(policy), *_option_faults(policy), *_rotary_faults(policy)):
        found.fault("model.path", f"{folder / 'config.json'}: {message}")


def check_generation_config(found: Findings, folder: Path) -> None:
    """vLLM starts with the model's generation_config.json."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_pretrained(str(folder))
    except OSError:  # vLLM goes without one that is no JSON
        pass
    except Exception as error:  # it checks some values, and stumbles over others
        found.fault(
            "model.path",
            f"{folder / 'generation_config.json'}: vLLM does not start with it ({error}). Correct the value, or copy "
            "the file again from where the model came from",
        )


def _class_faults(policy: PolicyModel) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    hf_config = policy.whole or policy.hf_config
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if policy.whole else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    expected = names[hf_config.model_type]
    named = (hf_config.architectures or [""])[0]
    if not named:
        yield f'there is no "architectures", by which vLLM chooses the model. Add "architectures": ["{expected}"]'
    elif named.lower() != expected.lower():
        yield f'"architectures" says {named}, and the trainer trains {expected}. Set it to ["{expected}"]'


def _option_faults(policy: PolicyModel) -> Iterator[str]:
    config, arch = policy.hf_config, policy.arch
    for option in OPTIONS:
        value = getattr(config, option.field, None)
        different = (
            value is False or value == 0
            if option.neutral is True
            else value and value not in (option.neutral, option.same)
        )
        if (not option.families or config.model_type in option.families) and different:
            yield (
                f"with {option.field} {value!r}, {option.effect}, unlike the trainer. Remove {option.field} if the "
                "model was trained without it; otherwise the model cannot be trained here"
            )
    if getattr(config, "is_causal", True) is False:
        yield "with is_causal false, vLLM's attention sees what comes later, unlike the trainer's. Remove is_causal"
    if config.model_type in _GPT_OSS:
        if any(windowed == (layer % 2 > 0) for layer, windowed in enumerate(arch.window_layers)):
            yield (
                "vLLM's attention sees windows in every other layer from the first, and layer_types says otherwise. "
                "The model cannot be trained here"
            )
        if config.rope_parameters["rope_type"] != "yarn":
            yield (
                f"vLLM's rotary embedding is yarn, and rope_type is {config.rope_parameters['rope_type']!r}. The model "
                "cannot be trained here"
            )
    # In vLLM it goes before attention_bias for queries, keys and values.
    own = getattr(config, "qkv_bias", None)
    if config.model_type in _LLAMA and own is not None and bool(own) != arch.qkv_bias:
        yield f"vLLM reads qkv_bias {own!r}, and the trainer attention_bias. Remove qkv_bias"
    if config.model_type == "qwen2" and arch.head_dim != arch.hidden // arch.heads:
        yield (
            f"head_dim is {arch.head_dim}, and vLLM's Qwen2 has heads of hidden_size / num_attention_heads = "
            f"{arch.hidden // arch.heads} dimensions. The model cannot be trained here"
        )


def _rotary_faults(policy: PolicyModel) -> Iterator[str]:
    hf_config, parameters = policy.hf_config, policy.hf_config.rope_parameters
    # The sections of Qwen3.5 are those of the places of images; of text all have the same.
    known = ("mrope_section",) if hf_config.model_type in _QWEN3_5 else ()
    if alone := [name for name in ROTARY_OPTIONS if parameters.get(name) and name not in known]:
        yield f"vLLM changes the rotary embedding by {alone[0]}, unlike the trainer. Remove {alone[0]}"
    elif (sections := parameters.get("mrope_section")) is not None:
        yield from _section_faults(sections, parameters["rope_type"], policy.arch.rotary_dim // 2)
    if parameters.get("rope_type") != "yarn":
        return
    numbers = ("factor", "beta_fast", "beta_slow")
    if empty := [name for name in numbers if name in parameters and not parameters[name]]:
        remedy = "Write the factor" if empty[0] == "factor" else f"Remove {empty[0]}"
        yield f"the rope scaling has {empty[0]} {parameters[empty[0]]!r}, with which vLLM does not start. {remedy}"


def _section_faults(sections: Any, kind: str, pairs: int) -> Iterator[str]:
    """Sections of positions with which vLLM does not start, or ends at the first request."""
    fit = isinstance(sections, list) and len(sections) == 3 and all(type(x) is int and x >= 0 for x in sections)
    if not fit or sum(sections) != pairs:
        yield (
            f"mrope_section is {sections!r}; vLLM wants three whole numbers with the sum {pairs}, half the dimensions "
            "of a head that rotary embeddings turn. Remove mrope_section, which does not matter for text"
        )
    elif kind not in ("default", "yarn"):
        yield (
            f"vLLM has no mrope_section with rope_type {kind!r}. Remove mrope_section, which does not matter for text"
        )


def quantization_fault(folder: Path, policy: PolicyModel, plain: bool) -> str:
    """What is wrong if a field or a file says that the weights are quantised; "" if none does.

    Args:
        plain: whether the stored tensors are those of a model that is not quantised.
    """
    source, method = _quantization(folder, policy)
    if not source:
        return ""
    kind = f" ({method})" if method else ""
    if plain:
        return (
            f"the weights in {folder} are not quantised, and {source}{kind} says that they are: vLLM would wait for "
            f"scales that are not there. Remove {source}"
        )
    if method == "mxfp4":
        return (
            f"the weights in {folder} are quantised{kind}, and only plain weights can be trained. Make a folder with "
            f"plain ones: spell convert hf-to-megatron --hf {folder} --megatron MEGATRON, and then spell convert "
            "megatron-to-hf --megatron MEGATRON --hf PLAIN"
        )
    return (
        f"the weights in {folder} are quantised{kind}, and only plain weights can be trained. Convert them to "
        f"bfloat16, and remove {source}"
    )


def _quantization(folder: Path, policy: PolicyModel) -> tuple[str, str]:
    """What tells vLLM that the weights are quantised ("": nothing), and how they are."""
    for hf_config in filter(None, (policy.whole, policy.hf_config)):
        for field in ("quantization_config", "compression_config"):
            if (described := getattr(hf_config, field, None)) is not None:
                method = described.get("quant_method", "") if isinstance(described, dict) else ""
                return f"{field} in config.json", method
    return (QUANTIZATION_FILE if (folder / QUANTIZATION_FILE).exists() else ""), ""


def check_positions(
    found: Findings,
    sampling: SamplingConfig,
    hf_config: Any,
    names: tuple[str, str] = ("max_prompt_tokens", "max_response_tokens"),
) -> None:
    """The longest prompt and response fit the positions of the model in vLLM. `names`: what a user calls the two."""
    longest, limit, field = sampling.longest_sequence, *position_limit(hf_config)
    if longest <= limit:
        return
    keys = (
        "rollout.sampling.max_prompt_tokens rollout.sampling.max_response_tokens "
        "rollout.sampling.max_verdict_tokens rollout.sampling.max_no_context_tokens model.path"
    )
    if names[0].startswith("--"):
        keys = " ".join(names)
    lower = f"Lower {names[0]} or {names[1]} by {longest - limit}"
    extended = _extended(hf_config)
    if limit < longest <= extended:
        text = f"{hf_config.rope_parameters['factor']:g} x original_max_position_embeddings, its rope scaling"
        lower = f"Raise {field} to {extended} ({text}) in config.json, or l{lower[1:]}"
    elif field == "rope scaling":
        lower += ", or correct factor and original_max_position_embeddings of the rope scaling in config.json"
    elif field == "max_position_embeddings":
        lower += ", or configure the model's rope scaling"
    else:
        lower += f", or raise {field} in config.json"
    found.fault(
        keys,
        f"the longest prompt and response together, {longest} tokens, are more than the model's {limit} positions "
        f"({field}). {lower}",
    )


def position_limit(hf_config: Any) -> tuple[int, str]:
    """Number of tokens that vLLM serves in a sequence, and what in config.json sets it.

    A linear rope scaling multiplies max_position_embeddings. For yarn and llama3 it holds the extended length already;
    vLLM's table for yarn ends at factor times original length, and behind it vLLM reads anything.
    """
    present = {name: value for name in LENGTH_FIELDS if (value := getattr(hf_config, name, None)) is not None}
    if own := getattr(hf_config, "model_max_length", None):
        present = {"model_max_length": own}
    field = min(present, key=lambda name: present[name])
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    limit = present[field] * (parameters["factor"] if parameters.get("rope_type") == "linear" else 1.0)
    if parameters.get("rope_type") == "yarn" and _extended(hf_config) < limit:
        return _extended(hf_config), "rope scaling"
    return int(limit), field


def _extended(hf_config: Any) -> int:
    """Positions to which yarn or llama3 extends a model; 0 without them."""
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in ("yarn", "llama3") or not parameters.get("factor"):
        return 0
    return int(parameters["factor"] * parameters["original_max_position_embeddings"])
