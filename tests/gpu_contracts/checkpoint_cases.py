"""What the tests of checkpoints, and the process with transformer-engine, share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from trainer_cases import Settings, make_config

from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.state import sharded_state
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.reshard import local_parameters, shard_place

# case: (family, fields of config.json)
CASES = {
    "dense": ("qwen3", {}),
    "experts": ("qwen3_moe", {}),
    "some-dense": ("qwen3_moe", {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "hybrid": ("qwen3_5_moe_text", {}),
}
CASES_OF_TRANSFORMER_ENGINE = CASES | {"biased-experts": ("gpt_oss", {})}
# case of an optimizer: settings
OPTIMIZERS = {
    "whole": {"training__optimizer__distributed": False},
    "whole-bfloat16": {"training__optimizer__distributed": False, "model__dtype": "bfloat16"},
    "distributed": {"training__optimizer__distributed": True},
    "distributed-bfloat16": {"training__optimizer__distributed": True, "model__dtype": "bfloat16"},
}
_LAYOUTS = [{}, {"tensor": 2, "pipeline": 2}]
_EXPERT_LAYOUTS = [{"tensor": 2, "expert": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 2}, {"expert": 4}]


def config_of(policy: Path, optimizer: str) -> Settings:
    return make_config(policy, **OPTIMIZERS[optimizer])


def pieces_of(state: Any) -> list[ShardedBase]:
    """The pieces that a checkpoint stores of a sharded state dict."""
    entries = (entry for entry in nested_values(state) if isinstance(entry, ShardedBase))
    built = (entry.build() if isinstance(entry, ShardedTensorFactory) else [entry] for entry in entries)
    return [piece for pieces in built for piece in nested_values(pieces)]


def entries_of(trainer: Trainer) -> dict[tuple, torch.Tensor]:
    """What a checkpoint holds of a trainer, weights and optimizer: (key, place in the whole tensor) to values."""
    state = sharded_state(trainer, with_optimizer=True, is_loading=False)
    pieces = pieces_of(state)
    assert all(isinstance(piece, ShardedTensor) for piece in pieces)
    return {(piece.key, tuple(piece.global_offset)): piece.data.detach().clone() for piece in pieces}


def same(one: dict[tuple, torch.Tensor], two: dict[tuple, torch.Tensor]) -> None:
    """Bit by bit, what `entries_of` gave of two trainers."""
    assert one.keys() == two.keys()
    assert any(key.startswith("optimizer.") for key, _ in one)
    for key in one:
        assert torch.equal(one[key], two[key]), key


def describe(policy_folder: Path) -> dict[tuple, dict[str, list]]:
    """Of each (layout, rank): the parameters' names and shapes, and the stored pieces."""
    policy = PolicyModel.load(policy_folder)
    layouts = [ParallelConfig(**layout) for layout in _LAYOUTS + (_EXPERT_LAYOUTS if policy.arch.experts else [])]
    ranks = {}
    for parallel, rank in ((layout, rank) for layout in layouts for rank in range(layout.fewest_processes)):
        with backend.pretend(policy, parallel, rank, parallel.fewest_processes):
            model = build_model(policy, TrainingConfig(parallel=parallel))
            parameters = list(local_parameters(model))
            for rule, parameter in parameters:
                whole = [torch.empty(shape, device="meta") for shape in rule.shapes]
                assert rule.shard(whole, *shard_place(rule)).shape == parameter.shape, rule.names
            ranks[str(parallel), rank] = {
                "parameters": sorted((rule.names, tuple(parameter.shape)) for rule, parameter in parameters),
                "stored": sorted(map(place_of, pieces_of(model.sharded_state_dict()))),
            }
    return ranks


def place_of(piece: ShardedBase) -> tuple:
    """The key of a piece, its place and its replica."""
    if not isinstance(piece, ShardedTensor):
        return piece.key, ("no tensor",)
    sizes = (piece.global_shape, piece.global_offset, piece.local_shape)
    return piece.key, *(tuple(size) for size in sizes), str(piece.dtype), str(piece.replica_id)
