"""Memory of a plan, compared with measured memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from benchmarks.planner_memory import make_config, static_bytes, update_peak
from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import ParallelConfig
from spell_megatron.planner.activations import head_bytes, offloaded_bytes, stage_activations
from spell_megatron.planner.gpus import Assumptions
from spell_megatron.planner.memory import counted_memory, step_bytes, trainer_memory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.phases import leaving
from spell_megatron.training import backend
from spell_megatron.training.host_copy import storages
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.state import sharded_state
from spell_megatron.training.swap import Swap
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


@pytest.mark.measures
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_what_leaves_and_what_is_saved(kind, dtype, checkpoints, monkeypatch):
    """The bytes of storages that leave, of the host's copy, and of what a checkpoint gathers are those of the plan."""
    config = make_config(checkpoints / kind, "none", {}, 1024)
    config.model.dtype, config.rollout.colocated = dtype, True
    policy = PolicyModel.load(checkpoints / kind, dtype)
    backend.initialise(policy, config.training, "cpu")
    try:
        model = build_model(policy, config.training)
        load_weights(model, checkpoints / kind)
        trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
        ones = np.ones(8, np.float32)
        trainer.update([Row(np.arange(16), 8, ones, -ones)])
        with monkeypatch.context() as patch:  # one rank gathers nothing on a GPU
            patch.setattr(torch.cuda, "current_device", lambda: pytest.fail("takes memory of the GPU"))
            state = sharded_state(trainer, with_optimizer=True, is_loading=False)["optimizer"]
        pieces = (x for x in nested_values(state) if isinstance(x, ShardedTensor | ShardedTensorFactory))
        gathered = sum(piece.data.nbytes for piece in pieces)
        swap = Swap(trainer.model, trainer.optimizer, "all")
        before = _bytes(swap)
        swap.leave()
        gone, copied = before - _bytes(swap), len(swap._state._host) + len(swap._weights._host)
    finally:
        backend.shutdown()
    memory = trainer_memory(ModelSize.of(policy), config, 1, Assumptions())
    assert memory.gather == 0
    left = leaving(config, memory)
    assert gone == before == pytest.approx(left.gpu, rel=1e-4)  # but for AdamW's numbers of steps
    assert copied == pytest.approx(left.host, rel=0.01)  # but for alignment
    # What a checkpoint holds at its end; while a part is joined, more.
    assert memory.saved > memory.parameters + gathered == memory.parameters + 12 * ModelSize.of(policy).parameters.all


def _bytes(swap: Swap) -> int:
    """Of the storages of weights, gradients and optimizer state, each once."""
    tensors = [*swap._weight_tensors(), *swap._gradient_tensors(), *swap._state_tensors()]
    return sum(storage.nbytes() for storage in storages(tensors))


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
