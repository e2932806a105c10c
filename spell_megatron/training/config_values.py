"""Values of config.json that no model can have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from spell_megatron.training.families import DeltaNets, Experts, Family

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_ALPHA = 1.702
"""Of `families.Experts.limit`."""
_TYPES = ("float32", "bfloat16", "float16", "float64")


def given_faults(family: Family, given: Mapping[str, Any], aliases: Mapping[str, str]) -> Iterator[str]:
    """Sizes that a file lacks, so that transformers would assume them, and those that are none.

    Args:
        given: the content of the file.
        aliases: transformers' own names of fields that the file may name otherwise.
    """
    needed, optional = list(_SIZES), ["num_key_value_heads", "head_dim"]
    if experts := family.experts:
        needed += [experts.count, experts.per_token, experts.width]
        needed += [experts.shared_width] if experts.shared_width else []
        optional += [experts.period] if experts.period else []
        if experts.dense_layers is None:
            needed.remove("intermediate_size")
    if family.delta_nets:
        needed += asdict(family.delta_nets).values()
    needed += [family.windows] if family.windows else []
    for field in (*needed, *optional):
        name = field if field in given else aliases.get(field, field)
        value, least = given.get(name), 0 if experts and field == experts.count and experts.dense_layers else 1
        if name not in given and field in needed:
            yield f"{field} is missing"
        elif (type(value) is not int or value < least) and not (value is None and field in optional):
            yield f"{name} is {value!r}; it must be a whole number of {least} or more"
    if family.delta_nets and given.get("layer_types") is None:
        yield from _interval(given.get("full_attention_interval", 4), given.get("num_hidden_layers"))


def _interval(interval: Any, layers: Any) -> Iterator[str]:
    """What is wrong with the number from which transformers makes the kinds of the layers."""
    if type(layers) is int and layers > 0 and not (type(interval) is int and 0 < interval <= layers):
        yield (
            f"full_attention_interval is {interval!r} and there are no layer_types; it must be a whole number from 1 "
            f"to num_hidden_layers, {layers}"
        )


def value_faults(family: Family, hf_config: Any) -> Iterator[str]:
    """Sizes that do not fit each other, and other numbers that cannot be."""
    yield from _heads(hf_config)
    if family.experts:
        yield from _experts(family.experts, hf_config)
    if family.delta_nets:
        yield from _delta_nets(family.delta_nets, hf_config)
    eps = hf_config.rms_norm_eps
    if not (isinstance(eps, float) and math.isfinite(eps) and eps > 0):
        yield f"rms_norm_eps is {eps!r}; it must be a number above 0"
    if hf_config.dtype is not None and str(hf_config.dtype).removeprefix("torch.") not in _TYPES:
        yield f"dtype is {hf_config.dtype}; it must be float32, bfloat16 or float16"
    yield from _rotary(hf_config.rope_parameters)


def _heads(hf_config: Any) -> Iterator[str]:
    hidden, heads, groups = hf_config.hidden_size, hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % groups:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    head_dim = getattr(hf_config, "head_dim", None)
    if head_dim is None and hidden % heads:
        yield f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
    elif (dimensions := head_dim or hidden // heads) % 2:
        yield f"head_dim is {dimensions}; it must be even, because rotary embeddings turn pairs of dimensions"
    elif (part := hf_config.rope_parameters.get("partial_rotary_factor")) is not None:
        turned = int(dimensions * part) if isinstance(part, int | float) and math.isfinite(part) else 0
        if turned % 2 or not 0 < turned <= dimensions:
            yield (
                f"partial_rotary_factor is {part!r}: of {dimensions} dimensions rotary embeddings turn {turned}, which "
                f"must be an even number from 2 to {dimensions}"
            )


def _experts(fields: Experts, hf_config: Any) -> Iterator[str]:
    count, chosen = getattr(hf_config, fields.count), getattr(hf_config, fields.per_token)
    if count and chosen > count:
        yield f"{fields.per_token} {chosen} is more than {fields.count} {count}"
    layers = range(hf_config.num_hidden_layers)
    dense = getattr(hf_config, fields.dense_layers) if fields.dense_layers else None
    if wrong := [layer for layer in dense or () if layer not in layers]:
        yield f"{fields.dense_layers} names layer {wrong[0]!r}; the layers have the numbers 0 to {layers[-1]}"
    if fields.limit and not (isinstance(limit := getattr(hf_config, fields.limit), int | float) and limit > 0):
        yield f"{fields.limit} is {limit!r}; it must be a number above 0"
    if fields.limit and (alpha := getattr(hf_config, "swiglu_alpha", _ALPHA)) != _ALPHA:
        yield f"swiglu_alpha is {alpha!r}; it must be {_ALPHA}, as in every released model"


def _delta_nets(fields: DeltaNets, hf_config: Any) -> Iterator[str]:
    heads, key_heads = getattr(hf_config, fields.heads), getattr(hf_config, fields.key_heads)
    if heads % key_heads:
        yield f"{fields.heads} {heads} is no multiple of {fields.key_heads} {key_heads}"
    if "full_attention" not in hf_config.layer_types:
        yield "layer_types has no full_attention, without which neither transformers nor vLLM runs the model"


def _rotary(parameters: Any) -> Iterator[str]:
    """What the frequencies themselves do not show (see `PolicyModel.rotary`)."""
    if "rope_type" not in parameters or any(isinstance(value, dict) for value in parameters.values()):
        yield (
            f"rope_parameters is {parameters!r}; it must hold rope_type and rope_theta themselves, not a set for each "
            "kind of layer"
        )
    elif parameters["rope_type"] == "default" and parameters.get("factor") not in (None, 1):
        yield f"rope_parameters has factor {parameters['factor']!r}, but no rope_type that uses it"
    elif parameters["rope_type"] == "llama3":
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = parameters.get(name)
            if not isinstance(value, int | float) or not value > 0:
                yield f"rope_parameters has {name} {value!r}; it must be a number above 0"
