"""The optimizer's state in host memory: the same updates as ever, and the same checkpoints.

In two processes: `test_swap.test_two_processes_in_several_layouts`.
"""

from pathlib import Path

import pytest
import torch
from swap_cases import compare_on_host, gone, kept_by, ordinary, updates
from trainer_cases import make_config, make_policy, make_trainer, save

from spell_megatron.checkpoint.restore import load
from spell_megatron.training import optimizer_on_host
from spell_megatron.training.optimizer import optimizer_parts
from spell_megatron.training.swap import Swap

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    make_policy("qwen3_moe", folder / "qwen3_moe")
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(optimizer_on_host, "PIECE_BYTES", 20_000)


@pytest.mark.parametrize(("dtype", "distributed"), [("float32", True), ("bfloat16", False)])
def test_updates_and_checkpoints_are_those_of_the_ordinary_optimizer(dtype, distributed, folder, tmp_path):
    config = make_config(folder / "qwen3_moe", model__dtype=dtype, training__optimizer__distributed=distributed)
    compare_on_host(config, tmp_path, ordinary(config))


def test_a_step_holds_one_piece_at_a_time(folder, monkeypatch):
    trainer = make_trainer(
        make_config(
            folder / "qwen3_moe",
            model__dtype="bfloat16",
            training__optimizer__distributed=True,
            training__optimizer__offload=True,
        )
    )
    list(updates(trainer, count=1))
    parts = optimizer_parts(trainer.optimizer)
    pieces = [piece for part in parts for piece in part.on_host._pieces]
    assert len(pieces) > 5
    largest = max(12 * p.numel() for piece in pieces for p in piece.parameters)
    held = []
    for part in parts:
        real = part.on_host._step

        def step(real=real):
            real()
            tensors = [x for piece in pieces for x in part.on_host._state(piece.parameters)]
            held.append(sum(x.untyped_storage().nbytes() for x in tensors))

        monkeypatch.setattr(part.on_host, "_step", step)
    list(updates(trainer, first=1, count=2))
    assert len(held) == len(pieces) and 0 < max(held) <= max(largest, 20_000)
    gone(trainer)


def test_weights_of_a_checkpoint_without_updates_become_the_float32_weights(folder, tmp_path):
    """What `load_trainer` copies from the model, when there is no optimizer state yet."""
    options = {"model__dtype": "bfloat16", "training__optimizer__distributed": True}
    config = make_config(folder / "qwen3_moe", **options)
    ordinary = make_trainer(config)
    for parameter in ordinary.model.parameters():
        parameter.data.mul_(2)
    saved = save(tmp_path, 0, ordinary, config, {})
    load(saved, ordinary)
    offloaded = make_trainer(make_config(folder / "qwen3_moe", training__optimizer__offload=True, **options))
    load(saved, offloaded)
    assert list(updates(offloaded, count=1)) == list(updates(ordinary, count=1))
    found, expected = kept_by(offloaded), kept_by(ordinary)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_both_together(folder):
    """State on the host and gradients and weights that leave: nothing of the trainer is on the device."""
    options = {"model__dtype": "bfloat16", "training__optimizer__distributed": True}
    ordinary = make_trainer(make_config(folder / "qwen3_moe", **options))
    expected = list(updates(ordinary, count=2))
    trainer = make_trainer(make_config(folder / "qwen3_moe", training__optimizer__offload=True, **options))
    swap = Swap(trainer.model, trainer.optimizer, "all")

    def turn() -> None:
        swap.leave()
        assert not any(parameter.untyped_storage().nbytes() for parameter in trainer.model.parameters())
        swap.come_back()

    assert list(updates(trainer, turn, count=2)) == expected
