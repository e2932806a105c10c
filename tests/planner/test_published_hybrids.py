"""Qwen3.5 in its published sizes: the numbers of parameters of the whole checkpoints, part by part."""

from pathlib import Path

import pytest
import torch
import transformers

from spell_megatron.planner.model_size import ModelSize
from spell_megatron.preflight.engine_model import check_engine_model
from spell_megatron.preflight.findings import Findings
from spell_megatron.training.policy import PolicyModel

MODELS = Path(__file__).parents[2] / "examples" / "models"

# The sizes that config.json gives, and the number of parameters that the hub shows for the safetensors files. Qwen3.6
# has the sizes 27B and 35B-A3B.
COMMON = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
SMALL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "linear_num_value_heads")
DENSE = {
    # name: (values of FIELDS, intermediate_size, the embedding is the head, vision tower, published number)
    "0.8B": (
        (24, 1024, 8, 2, 16),
        3584,
        True,
        SMALL_VISION | {"depth": 12, "hidden_size": 768, "intermediate_size": 3072},
        873_438_784,
    ),
    "2B": ((24, 2048, 8, 2, 16), 6144, True, SMALL_VISION, 2_274_069_824),
    "4B": ((32, 2560, 16, 4, 32), 9216, True, SMALL_VISION, 4_659_865_088),
    "9B": ((32, 4096, 16, 4, 32), 12288, False, {}, 9_653_104_368),
    "27B": ((64, 5120, 24, 4, 48), 17408, False, {}, 27_781_427_952),
}
EXPERTS = {
    # name: (values of FIELDS, experts, of them for a token, width of each and of the shared one, published number)
    "35B-A3B": ((40, 2048, 16, 2, 32), 256, 8, 512, 35_951_822_704),
    "122B-A10B": ((48, 3072, 32, 2, 64), 256, 8, 1024, 125_086_497_008),
    "397B-A17B": ((60, 4096, 32, 2, 64), 512, 10, 1024, 403_397_928_944),
}
LANGUAGE = {"9B": 8_953_803_264, "27B": 26_895_998_464, "35B-A3B": 34_660_610_688}
"""Of the language models of examples/models alone."""


def configuration(name: str) -> transformers.PretrainedConfig:
    if name in DENSE:
        sizes, width, tied, vision, _ = DENSE[name]
        own = {"intermediate_size": width, "tie_word_embeddings": tied}
        kind = transformers.Qwen3_5Config
    else:
        sizes, count, chosen, width, _ = EXPERTS[name]
        own = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
        own["shared_expert_intermediate_size"] = width
        vision, tied, kind = {}, False, transformers.Qwen3_5MoeConfig
    text = COMMON | dict(zip(FIELDS, sizes, strict=True)) | own
    tower = vision | {"out_hidden_size": text["hidden_size"]}
    return kind(text_config=text, vision_config=tower, tie_word_embeddings=tied)


def vision_parameters(config: transformers.PretrainedConfig) -> int:
    with torch.device("meta"):
        tower = transformers.AutoModel.from_config(config.vision_config)
    return sum(parameter.numel() for parameter in tower.parameters())


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_the_parts_of_a_checkpoint_add_up_to_the_published_number(name):
    """Language model, vision tower, and the layer that predicts one more token: one with attention, which a projection
    of two hidden states and three norms come with."""
    config = configuration(name)
    size = ModelSize.of(PolicyModel.of(config))
    hidden, last = size.arch.hidden, size.layers[-1]
    assert not size.arch.delta_layers[-1]
    predicting = sum(last) + 2 * hidden * hidden + 3 * hidden
    published = (DENSE | EXPERTS)[name][-1]
    assert size.parameters.all + vision_parameters(config) + predicting == published
    assert size.parameters.all == LANGUAGE.get(name, size.parameters.all)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_examples_are_configured_as_published(name):
    policy = PolicyModel.load(MODELS / f"qwen3.5_{name.lower().replace('-', '_')}")
    assert policy.arch == PolicyModel.of(configuration(name)).arch
    assert ModelSize.of(policy).parameters.all == LANGUAGE[name]
    assert policy.whole and policy.dtype == torch.bfloat16 and not policy.arch.tied
    found = Findings()
    check_engine_model(found, MODELS, policy)
    assert not found.faults
