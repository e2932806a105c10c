"""The recipes of examples/: published numbers of parameters, and whether they fit."""

from pathlib import Path

import pytest
import torch
import transformers

from spell_megatron.config.reading import load_config
from spell_megatron.planner.gpus import GPUS, Assumptions
from spell_megatron.planner.memory import estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import make_plan
from spell_megatron.planner.text import limits_text
from spell_megatron.training.policy import PolicyModel

EXAMPLES = Path(__file__).parents[2] / "examples"
PAPER = EXAMPLES / "paper_16k.yaml"
PUBLISHED = {
    "llama_3.1_8b_instruct": 8_030_261_248,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_7b_instruct": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen2.5_14b_instruct": 14_770_033_664,
    "qwen2.5_32b": 32_763_876_352,
    "qwen2.5_32b_instruct": 32_763_876_352,
    "qwen3_30b_a3b_instruct_2507": 30_532_122_624,
    "qwen3_30b_a3b_thinking_2507": 30_532_122_624,
    "qwen3_4b_thinking_2507": 4_022_468_096,
    "r1_distill_llama_8b": 8_030_261_248,
    "r1_distill_qwen_14b": 14_770_033_664,
}

GPT_OSS = {"gpt_oss_20b": 20_914_757_184, "gpt_oss_120b": 116_829_156_672}
DENSE_27B = {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 48,
}


@pytest.mark.parametrize(("name", "parameters"), (PUBLISHED | GPT_OSS).items())
def test_the_number_of_parameters_is_the_published_one(name, parameters):
    assert ModelSize.of(PolicyModel.load(EXAMPLES / "models" / name)).parameters.all == parameters


@pytest.mark.parametrize(
    ("family", "fields", "parameters"),
    [
        ("Qwen3_5Moe", {}, 34_660_610_688),  # the defaults of transformers
        ("Qwen3_5", {}, 8_953_803_264),
        ("Qwen3_5", DENSE_27B, 26_895_998_464),
        ("GptOss", {}, GPT_OSS["gpt_oss_120b"]),
    ],
)
def test_the_number_of_parameters_of_other_families_is_that_of_transformers(family, fields, parameters):
    text = "Text" if family.startswith("Qwen3_5") else ""
    config = getattr(transformers, f"{family}{text}Config")(**fields)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert ModelSize.of(PolicyModel.of(config)).parameters.all == parameters


@pytest.mark.parametrize(
    ("files", "gpu", "parameters"),
    [
        (["qwen3_30b_a3b_16k_8xh100.yaml"], "H100-80G", None),
        (["qwen3_30b_a3b_100k_8xh200.yaml"], "H200-141G", None),
        (["qwen3.5_9b_8xh100.yaml"], "H100-80G", None),
        (["qwen3.5_35b_a3b_100k.yaml"], "H200-141G", None),
        (["qwen3.5_35b_a3b_256k.yaml"], "H200-141G", None),
        (["qwen3_30b_a3b_thinking_100k.yaml"], "H100-80G", 4_018_747_392),
        (["qwen3_30b_a3b_thinking_100k_h200.yaml"], "H200-141G", None),
        *((["paper_16k.yaml", f"paper_16k/{name}.yaml"], "A100-80G", None) for name in PUBLISHED),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_recipes_fit(files, gpu, parameters):
    config = load_config([EXAMPLES / file for file in files])
    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    processes = config.training.parallel.processes
    plan = make_plan(model, config, processes, GPUS[gpu], Assumptions())
    assert plan.fits
    assert parameters is None or plan.memory.parameters == 2 * parameters


def test_the_papers_recipes_differ_only_where_the_paper_does():
    """Twelve models; what is not about memory and machines differs only in the length of a response."""
    recipes = sorted(PAPER.with_suffix("").glob("*.yaml"))
    assert [recipe.stem for recipe in recipes] == sorted(PUBLISHED)
    thinking = {"qwen3_30b_a3b_thinking_2507", "qwen3_4b_thinking_2507", "r1_distill_llama_8b", "r1_distill_qwen_14b"}
    common = None
    for recipe in recipes:
        config = load_config([PAPER, recipe])
        sampling = config.rollout.sampling
        assert config.model.path.resolve() == EXAMPLES / "models" / recipe.stem
        assert sampling.max_response_tokens == (20_000 if recipe.stem in thinking else 4096)
        assert sampling.max_prompt_tokens + sampling.max_response_tokens <= config.training.tokens_per_microbatch
        own = {
            "run": {"name"},
            "model": {"path"},
            "rollout": {"replicas": True, "tensor_parallel": True, "sampling": {"max_response_tokens"}},
            "training": {"tokens_per_microbatch", "recompute", "parallel"},
        }
        rest = config.model_dump(exclude=own)
        common = common or rest
        assert rest == common


@pytest.mark.parametrize(("name", "gpu"), [("16k_8xh100", "H100-80G"), ("100k_8xh200", "H200-141G")])
def test_one_node_trains_the_flagship(name, gpu):
    """Eight GPUs that trainer and engines share, with room for the other phases; not so with GPUs of their own."""
    config = load_config(EXAMPLES / f"qwen3_30b_a3b_{name}.yaml")
    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    plan = make_plan(model, config, 8, GPUS[gpu], Assumptions(), estimate)
    assert plan.gpus == 8 and config.rollout.colocated and config.rollout.gpu_memory_utilization is None
    assert all(phase.total < 0.75 * plan.gpu.memory for phase in plan.phases if phase.name != "generate")
    assert plan.engine.share == 0.92 and plan.engine.sequences > 16
    assert limits_text(plan).startswith("host memory (1,457 of ")
    for swap, offload in (("auto", False), ("none", False)):  # only the larger GPUs hold the optimizer's state too
        other = config.model_copy(deep=True)
        other.training.swap, other.training.optimizer.offload = swap, offload
        assert make_plan(model, other, 8, GPUS[gpu], Assumptions(), estimate).fits == (gpu == "H200-141G")
