"""Which layers a pipeline stage has: by their number, or by what they cost."""

from itertools import combinations, pairwise

import pytest
from families import hf_config

from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.training import backend
from spell_megatron.training.cost import head_flops, layer_flops, training_cost
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.stages import PREDICTING, slowest_stage, stage_layers

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def policy(family: str, layers: int, **fields) -> PolicyModel:
    return PolicyModel.of(hf_config(family, **SIZES, num_hidden_layers=layers, **fields), "float32")


def test_the_first_stages_have_a_layer_more_where_all_take_the_same_time():
    arch = policy("qwen3", 11).arch
    assert stage_layers(arch, 4, 100_000) == (range(3), range(3, 6), range(6, 9), range(9, 11))
    assert slowest_stage(arch, 4, 100_000) == 1.0


@pytest.mark.parametrize("tokens", [100, 20_000])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_no_other_cut_has_a_faster_slowest_stage(stages, tokens):
    """Every way to cut nine layers, of which three have attention, two of these at the end."""
    kinds = ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 3 + ["full_attention"] * 2
    arch = policy("qwen3_5_text", 9, layer_types=kinds).arch
    costs = [layer_flops(arch, layer, tokens) for layer in range(9)]

    def slowest(cut: tuple[range, ...]) -> float:
        each = [sum(costs[layer] for layer in layers) for layers in cut]
        return max([*each[:-1], each[-1] + PREDICTING * head_flops(arch)])

    ends = [(0, *inner, 9) for inner in combinations(range(1, 9), stages - 1)]
    every = [tuple(range(a, b) for a, b in pairwise(each)) for each in ends]
    found = stage_layers(arch, stages, tokens)
    assert found in every and slowest(found) == min(map(slowest, every))
    whole = sum(costs) + PREDICTING * head_flops(arch)
    assert slowest_stage(arch, stages, tokens) == pytest.approx(slowest(found) * stages / whole)


def test_long_rows_move_layers_away_from_attention():
    arch = policy("qwen3_5_text", 6, layer_types=["full_attention"] + ["linear_attention"] * 5).arch
    assert [len(layers) for layers in stage_layers(arch, 2, 100)] == [3, 3]
    assert [len(layers) for layers in stage_layers(arch, 2, 100_000)] == [1, 5]


def test_layers_add_up_to_the_whole_models_cost():
    arch = policy("qwen3_5_moe_text", 4).arch
    cost = training_cost(arch)
    layers = sum(layer_flops(arch, layer, 1000) for layer in range(4))
    assert layers == pytest.approx(cost.token + cost.pair * 500)


def test_megatron_builds_these_stages():
    whole = policy("qwen3_5_text", 6, layer_types=["full_attention"] + ["linear_attention"] * 5)
    training = TrainingConfig(parallel=ParallelConfig(processes=2, pipeline=2), tokens_per_microbatch=100_000)
    for rank, layers in enumerate(stage_layers(whole.arch, 2, 100_000)):
        with backend.pretend(whole, training.parallel, rank, 2):
            assert build_model(whole, training).layers == layers
