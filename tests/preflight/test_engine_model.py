"""config.json as vLLM reads it: options that the trainer does not share, and how long sequences may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import LLAMA3_ROPE, hf_config

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.preflight.engine_model import check_engine_model, check_positions, position_limit
from spell_megatron.preflight.findings import Findings
from spell_megatron.training.policy import PolicyModel

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
CLASSES |= {"qwen3_5_text": "Qwen3_5", "qwen3_5_moe_text": "Qwen3_5Moe", "gpt_oss": "GptOss"}


def faults(family: str, **fields: object) -> list[str]:
    named = {"architectures": [f"{CLASSES[family]}ForCausalLM"]} | fields
    found = Findings()
    config = hf_config(family, **named)
    config.architectures = named["architectures"]
    check_engine_model(found, Path("policy"), PolicyModel.of(config))
    return [fault.message for fault in found.faults]


@pytest.mark.parametrize("family", CLASSES)
def test_released_models_have_no_fault(family):
    assert faults(family) == []


def test_sections_of_positions_do_not_matter_for_text():
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
    options = {"attn_output_gate": True, "output_gate_type": "silu", "norm_topk_prob": True}
    assert faults("qwen3_5_moe_text", rope_parameters=rope, **options) == []
    assert faults("qwen3_5_moe_text", output_gate_type="swish") == []
    (fault,) = faults("qwen3_5_moe_text", output_gate_type="sigmoid")
    assert "have another gate" in fault


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "default", "mrope_section": [11, 11, 11]}, "with the sum 4, half the dimensions"),
        ({"rope_type": "default", "mrope_section": [2, 2]}, "three whole numbers"),
        ({"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 1, 1]}, "with rope_type 'linear'"),
    ],
)
def test_sections_that_vllm_has_not_are_refused(rope, message):
    common = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    (fault,) = faults("qwen3_5_text", rope_parameters=common | rope)
    assert message in fault and "Remove mrope_section" in fault


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_models_that_also_see_images_have_a_class_of_their_own(family):
    name = f"{CLASSES[family]}ForConditionalGeneration"
    assert faults(family, vision=True, architectures=[name]) == []
    (fault,) = faults(family, vision=True, architectures=[f"{CLASSES[family]}ForCausalLM"])
    assert f'the trainer trains {name}. Set it to ["{name}"]' in fault


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3", {"attention_bias": True}, "no bias on the attention's output (o_proj.bias)"),
        ("qwen3_moe", {"attention_bias": True}, "no bias on the attention's output (o_proj.bias)"),
        ("gpt_oss", {"attention_bias": False}, "vLLM adds biases to the attention"),
        ("gpt_oss", {"rms_norm_eps": 1e-6}, "norms add 1e-05"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "bound gates and ups by 7"),
        ("gpt_oss", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "windows in every other layer"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_type is 'default'"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "adds a shared expert"),
        ("qwen3_5_text", {"attention_bias": True}, "no biases in the attention"),
        ("qwen3_5_text", {"attn_output_gate": False}, "no gate on the attention's output"),
        ("qwen3_5_moe_text", {"norm_topk_prob": False}, "do not sum to one"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 64}}, "goes over two chunks"),
        ("qwen2", {"qk_norm": True}, "adds norms to queries and keys"),
        (
            "qwen2",
            {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4},
            "head_dim is 64",
        ),
        ("qwen2", {"is_causal": False}, "sees what comes later"),
        ("mistral", {"attention_bias": True}, "adds biases to the attention"),
        ("mistral", {"mlp_bias": True}, "adds biases to the feed-forward"),
        ("llama", {"bias": True}, "adds biases to the attention"),
        ("llama", {"qkv_bias": False, "attention_bias": True}, "reads qkv_bias False"),
        ("llama", {"logit_scale": 0.5}, "scales the logits"),
        ("llama", {"sliding_window": 4096}, "sees a window only"),
        ("qwen3", {"architectures": None}, 'Add "architectures": ["Qwen3ForCausalLM"]'),
        ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, 'Set it to ["Qwen3ForCausalLM"]'),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
            "factor None",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            "mrope_section",
        ),
    ],
)
def test_what_vllm_reads_otherwise_is_named(family, fields, message):
    (fault,) = faults(family, **fields)
    assert message in fault and fault.startswith("policy/config.json: ")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"logit_scale": 1.0, "is_causal": True, "bias": False}),
        ("llama", {"architectures": ["LLaMAForCausalLM"]}),  # as the first conversions had it
        ("qwen3", {"attention_bias": False, "dual_chunk_attention_config": None}),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}),
    ],
)
def test_what_both_read_alike_is_allowed(family, fields):
    assert faults(family, **fields) == []


def yarn(factor: float, original: int | None, **more: object) -> dict:
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original}
    return {"rope_parameters": {name: value for name, value in (scaling | more).items() if value is not None}}


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, (4096, "max_position_embeddings")),
        ({"max_sequence_length": 2048}, (2048, "max_sequence_length")),
        ({"model_max_length": 8192}, (8192, "model_max_length")),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            (8192, "max_position_embeddings"),
        ),
        (yarn(4, 1024), (4096, "max_position_embeddings")),
        (yarn(4, 512), (2048, "rope scaling")),
        (yarn(4, 4096), (4096, "max_position_embeddings")),
        (yarn(4, None), (4096, "max_position_embeddings")),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 1000}},
            (2500, "rope scaling"),
        ),
    ],
)
def test_positions_of_a_model(fields, limit):
    config = hf_config("qwen3", **{"max_position_embeddings": 4096} | fields)
    assert position_limit(config) == limit


def test_tables_of_vllm_have_the_values_of_the_trainer_up_to_the_limit():
    """vLLM reads cosines and sines from a table that nothing guards at its end; the trainer computes them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    scalings = [
        yarn(4, 512),
        yarn(2.5, 512),
        yarn(4, None),
        yarn(4, 512, attention_factor=0.9),
        yarn(4, 512, mscale=0.7, mscale_all_dim=0.3),
        yarn(4, 512, beta_fast=16, beta_slow=2),
        yarn(4, 512, truncate=False),
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, "rope_theta": 1e6},
    ]
    with set_current_vllm_config(VllmConfig()):
        for scaling in scalings:
            config = hf_config("qwen3", max_position_embeddings=2048, **scaling)
            theirs = get_rope(config.head_dim, 2048, rope_parameters=config.rope_parameters, dtype=torch.float32)
            limit, _ = position_limit(config)
            assert limit <= len(theirs.cos_sin_cache)
            frequencies, factor = PolicyModel.of(config).rotary
            angles = torch.arange(limit)[:, None] * frequencies
            ours = torch.cat([angles.cos(), angles.sin()], dim=-1) * factor
            torch.testing.assert_close(ours, theirs.cos_sin_cache[:limit], atol=1e-6, rtol=0)


def told(prompt: int, **fields: object) -> str:
    found = Findings()
    config = hf_config("qwen2", **fields)
    check_positions(found, SamplingConfig(max_prompt_tokens=prompt, max_response_tokens=100), config)
    return found.faults[0].message if found.faults else ""


def test_each_limit_of_positions_has_its_remedy():
    # as model cards say it: the scaling is added, and max_position_embeddings is left
    card = {"max_position_embeddings": 512} | yarn(4, 512)
    assert "Raise max_position_embeddings to 2048 (4 x original_max_position_embeddings, its" in told(1436, **card)
    assert not told(1436, **card | {"max_position_embeddings": 2048})
    beyond = told(1436, max_position_embeddings=4096, **yarn(4, 128))
    assert "are more than the model's 512 positions (rope scaling). Lower" in beyond
    assert "correct factor and original_max_position_embeddings" in beyond
    assert "configure the model's rope scaling" in told(1436, max_position_embeddings=512)
    assert "raise max_sequence_length" in told(1436, max_position_embeddings=4096, max_sequence_length=512)
