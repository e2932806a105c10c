"""The keys of checkpoints are the same whichever layers saved them, as far as that shows without transformer-engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_cases import CASES, config_of, describe, entries_of, same
from megatron.core.models.gpt.gpt_model import GPTModel
from trainer_cases import initialise, make_policy, make_rows, make_trainer, save

from spell_megatron.checkpoint.restore import load
from spell_megatron.config.schema import ParallelConfig
from spell_megatron.training import backend, layers, model
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.convert import compare, hf_to_megatron

OLD, NEW = ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for case, (family, fields) in CASES.items():
        make_policy(family, folder / case, **fields)
    return folder


@pytest.mark.parametrize(
    ("case", "layers"),
    [("dense", {"layers": OLD}), ("experts", {"0": NEW, "1": NEW}), ("some-dense", {"0": OLD, "1": NEW, "2": OLD})],
)
def test_keys_are_those_of_transformer_engine(case, layers, policies):
    """transformer-engine keeps the norm of a dense feed-forward in its first linear layer, that of experts apart."""
    stored = [piece for rank in describe(policies / case).values() for piece in rank["stored"]]
    assert not [piece for piece in stored if piece[1] == ("no tensor",)]
    keys = {piece[0] for piece in stored}
    assert {key for key in keys if OLD in key or NEW in key} == {
        f"decoder.layers{'' if layer == 'layers' else '.' + layer}{norm}weight" for layer, norm in layers.items()
    }


def old_state(self, *args, **kwargs):
    """A sharded state dict of version 0.1, with plain layers."""
    entries = GPTModel.sharded_state_dict(self, *args, **kwargs)
    for entry in entries.values():
        entry.key = entry.key.replace(NEW, OLD)
    return entries


@pytest.mark.parametrize("optimizer", ["whole", "distributed-bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_version_0_1_load(case, optimizer, policies, monkeypatch, tmp_path):
    config = config_of(policies / case, optimizer)
    try:
        trainer, other = trainers(config)
        with monkeypatch.context() as version_0_1:
            version_0_1.setattr(model.TreeGPTModel, "sharded_state_dict", old_state)
            folder = save(tmp_path, 1, trainer, config, {})
        load(folder, other)
        same(entries_of(other), entries_of(trainer))
    finally:
        backend.shutdown()
    compare(folder, folder / "hf")


@pytest.mark.parametrize("case", CASES)
def test_conversions_of_version_0_1_load(case, policies, monkeypatch, tmp_path):
    with monkeypatch.context() as version_0_1:
        version_0_1.setattr(model.TreeGPTModel, "sharded_state_dict", old_state)
        hf_to_megatron(policies / case, tmp_path / "megatron", ParallelConfig(tensor=2))
    compare(tmp_path / "megatron", policies / case)


class NormWithExtraState(layers.RMSNorm):
    """As those of transformer-engine, which hold an extra state that no plain norm has."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("it was saved")


@pytest.mark.parametrize("to_extra_state", [True, False])
@pytest.mark.parametrize("case", ["dense", "experts"])
def test_extra_state_is_neither_saved_nor_wanted(case, to_extra_state, policies, monkeypatch, tmp_path):
    kinds = [layers.RMSNorm, NormWithExtraState]
    config = config_of(policies / case, "distributed")
    try:
        trainer, other = trainers(config, monkeypatch, kinds if to_extra_state else kinds[::-1])
        load(save(tmp_path, 1, trainer, config, {}), other)
        same(entries_of(other), entries_of(trainer))
    finally:
        backend.shutdown()


def trainers(config, monkeypatch=None, norms=()) -> tuple[Trainer, Trainer]:
    """A trainer after an update and a new one, with norms of these two kinds."""
    initialise(config)
    made = []
    for number in range(2):
        if norms:
            monkeypatch.setattr(layers, "RMSNorm", norms[number])
        made.append(make_trainer(config))
    made[0].update(make_rows(0))
    return tuple(made)
