"""A checkpoint put into a new trainer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from spell_megatron.checkpoint.folder import check_complete, latest, wait_until_seen
from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_rank_0
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.state import load_trainer, set_random_states
from spell_megatron.training.trainer import Trainer


def restore(run_folder: Path, trainer: Trainer) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint of a run (see `load`); returns its step and the state saved with it.

    Raises:
        UserError: there is none, or it does not load.
    """
    state = load(_newest(run_folder), trainer)
    return state["step"], state


def _newest(run_folder: Path) -> Path:
    """The newest checkpoint that rank 0 sees, on all ranks. Other nodes may still see an older one."""
    newest, fault = None, ""
    if dist.get_rank() == 0:
        try:
            newest = latest(run_folder)
        except UserError as error:
            fault = str(error)
    newest, fault = from_rank_0((newest, fault))
    if newest is None:
        raise UserError(
            fault or f"There is no checkpoint in {run_folder / 'checkpoints'}; start the run without --resume."
        )
    wait_until_seen(newest / "meta.json")
    return newest


def load(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer, schedule and random states in place; returns `state`.

    All ranks call it, with a trainer that has not stepped yet. The layout of ranks may differ from the
    one that saved; then ranks beyond those that saved keep the random states they have. The learning
    rate, its schedule, weight decay and betas are those of the trainer's configuration. UserError if the
    checkpoint is incomplete or belongs to another model.
    """
    folder = Path(folder)
    check_complete(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    updates = meta["updates"]
    _check_model(folder, trainer.policy)
    try:
        load_trainer(folder / "trainer", trainer, updates)
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise UserError(
            f"The checkpoint {folder} does not load into this model ({type(error).__name__}: {error}). "
            f"Check that model.path is the model the run began with (see {folder / 'config.json'}), or "
            "remove the folder and resume from an older checkpoint."
        ) from error
    states = folder / "rng" / f"rank_{dist.get_rank():05d}.pt"
    if states.exists():
        set_random_states(torch.load(states, weights_only=True))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _check_model(folder: Path, policy: PolicyModel) -> None:
    """UserError if a checkpoint belongs to another model.

    Megatron itself loads a vocabulary of another size, whose padding may be the same, and ignores tensors in excess.
    """

    def traits(model: PolicyModel) -> dict[str, Any]:
        of = model.hf_config
        return {"model_type": of.model_type, **asdict(model.arch), "rope_parameters": of.rope_parameters}

    saved, ours = traits(PolicyModel.load(folder / "hf")), traits(policy)
    if different := [f"{name} {saved[name]} (now {ours[name]})" for name in saved if saved[name] != ours[name]]:
        raise UserError(
            f"The checkpoint {folder} was made with another model than that of model.path: {', '.join(different)}. Set "
            "model.path to the model that the run began with."
        )
