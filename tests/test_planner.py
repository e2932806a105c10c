"""Counts against published and real ones, predicted against measured memory, and the command."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.planner_memory import make_checkpoint, make_config, static_bytes, update_peak
from spell_megatron.cli import main
from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import ParallelConfig
from spell_megatron.planner.activations import head_bytes, offloaded_bytes, stage_activations
from spell_megatron.planner.gpus import GPUS, Assumptions, Gpu
from spell_megatron.planner.memory import counted_memory, engine_memory, step_bytes
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.search import fastest, plan_layout
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import load_weights

EXAMPLES = Path(__file__).parents[1] / "examples"
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

# Of the same sizes, in the same layout and with rows of the same length as another.
TWINS = {"qwen2.5_7b", "qwen2.5_14b", "qwen2.5_32b"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    assert ModelSize.of(PolicyModel.load(EXAMPLES / "models" / name)).parameters.all == PUBLISHED[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    for kind in ("dense", "moe"):
        make_checkpoint(kind, folder / kind)
    return folder


@pytest.mark.parametrize(
    ("recompute", "offload"), [("none", False), ("selective", False), ("full", False), ("full", True)]
)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_prediction_against_measured_memory(kind, recompute, offload, checkpoints):
    """Parameters, gradients and optimizer state equal; the peak of an update within 15 %."""
    config = make_config(checkpoints / kind, recompute, {}, 1024)
    policy = PolicyModel.load(checkpoints / kind, config.model.dtype)
    config.training.offload = offload
    backend.initialise(policy, config.training, "cpu")
    try:
        model = build_model(policy, config.training)
        load_weights(model, checkpoints / kind)
        trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
        rng = np.random.default_rng(0)
        tokens, ones = rng.integers(0, 4096, (2, 768)), np.ones(256, np.float32)
        tokens[1, :512] = tokens[0, :512]
        rows = [Row(row, 512, ones, -ones) for row in tokens]
        trainer.update(rows)
        peak, static = update_peak(trainer, rows), static_bytes(trainer)
    finally:
        backend.shutdown()
    assert static == counted_memory(policy, config, 0, 1)[:3]
    arch = policy.arch
    kept, layer = stage_activations(arch, config, range(4), 1024, 1, gpu=False)
    assert (kept == 0) == offload
    kept += offloaded_bytes(arch, config, range(4), 1024, 1, gpu=False)  # the same memory on a CPU
    activations = kept + max(layer, head_bytes(arch, config, 1024))
    predicted = max(activations, step_bytes(config, static[2]))
    print(f"{kind}, recompute {recompute}, offload {offload}: {predicted / peak - 1:+.1%}")
    assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", {"tensor": 2, "pipeline": 2}),
        ("moe", {"pipeline": 2, "expert": 4}),
        ("moe", {"tensor": 2, "expert": 2}),
    ],
)
def test_ranks_together_hold_the_model_once(kind, layout, checkpoints):
    """The distributed optimizer of all 8 ranks together steps every parameter once (but for padding)."""
    config = make_config(checkpoints / kind, "none", layout, 1024)
    policy = PolicyModel.load(checkpoints / kind, config.model.dtype)
    held = sum(counted_memory(policy, config, rank, 8)[2] for rank in range(8))
    whole = 12 * ModelSize.of(policy).parameters.all
    # Norms and routers are there once for each tensor-parallel rank.
    assert whole <= held <= 1.01 * whole


def test_the_proposal_is_the_fastest_that_fits(checkpoints):
    config = make_config(checkpoints / "moe", "full", {}, 1024)
    model, gpu = ModelSize.of(PolicyModel.load(checkpoints / "moe", config.model.dtype)), GPUS["H100-80G"]
    tried = list(fastest(model, config, 8, gpu, Assumptions()))
    assert tried[-1].fits and tried[-1].recompute == "none"
    assert tried[-1].times.update < plan_layout(model, config, 8, gpu, Assumptions()).times.update
    small = Gpu(2**30, gpu.flops, gpu.bandwidth, gpu.link)
    assert not list(fastest(model, config, 8, small, Assumptions()))


def test_memory_moves_as_it_must():
    """More context-parallel ranks or recompute: fewer activations; more pipeline stages: fewer parameters."""
    config = load_config(EXAMPLES / "qwen3_30b_a3b_thinking_100k.yaml")
    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))

    def activations(recompute: str, **layout: int) -> int:
        training = config.training.model_copy(
            update={"parallel": ParallelConfig(processes=32, **layout), "recompute": recompute}
        )
        changed = config.model_copy(update={"training": training})
        return stage_activations(model.arch, changed, range(48), 100_000, 1, gpu=True)[0]

    assert activations("full", context=8) < activations("selective", context=8) < activations("none", context=8)
    assert activations("full", context=8) == pytest.approx(activations("full", context=4) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("files", "gpu", "parameters"),
    [
        (["qwen3_30b_a3b_thinking_100k.yaml"], "H100-80G", 4_018_747_392),
        (["qwen3_30b_a3b_thinking_100k_h200.yaml"], "H200-141G", None),
        *(
            pytest.param(
                *(["paper_16k.yaml", f"paper_16k/{name}.yaml"], "A100-80G", None),
                marks=[pytest.mark.slow] if name in TWINS else [],
            )
            for name in PUBLISHED
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_recipes_fit(files, gpu, parameters):
    config = load_config([EXAMPLES / file for file in files])
    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    processes = config.training.parallel.processes
    plan = plan_layout(model, config, processes, GPUS[gpu], Assumptions())
    assert plan.fits
    assert parameters is None or plan.memory.parameters == 2 * parameters
    assert engine_memory(model, config, GPUS[gpu], Assumptions()).sequences > 1


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


def test_the_command(checkpoints, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {checkpoints / 'moe'}}}\ndata: {{documents: none}}\n")
    assert main(["plan", "--config", str(path), "--training.parallel.processes=2"]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed and "active per token" in printed and "proposal" in printed
    assert main(["plan", "--config", str(path), "--gpu", "H1000"]) == 2
    assert "Known are A100-80G" in capsys.readouterr().err
    big = str(EXAMPLES / "qwen3_30b_a3b_thinking_100k.yaml")
    alone = ["--training.parallel.processes=1", "--training.parallel.tensor=1", "--training.parallel.context=1"]
    assert main(["plan", "--config", big, *alone, "--training.parallel.expert=1"]) == 2
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "no layout on 1 GPUs fits" in printed
