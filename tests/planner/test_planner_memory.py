"""Memory of a plan, compared with measured memory."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.planner_memory import make_config, static_bytes, update_peak
from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import ParallelConfig
from spell_megatron.planner.activations import head_bytes, offloaded_bytes, stage_activations
from spell_megatron.planner.memory import counted_memory, step_bytes
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import load_weights

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.measures
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
