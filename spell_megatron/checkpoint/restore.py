"""A checkpoint put into a new trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from spell_megatron.checkpoint.folder import (
    ROWS,
    best,
    go_on_without,
    latest,
    read_meta,
    read_object,
    read_state,
    wait_until_seen,
)
from spell_megatron.checkpoint.same_model import check_same_model
from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_all, from_rank_0
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.rows_file import read_rows
from spell_megatron.training.state import load_trainer, set_random_states
from spell_megatron.training.trainer import Trainer

Result = TypeVar("Result")


def restore(run_folder: Path, trainer: Trainer) -> tuple[int, dict[str, Any], list[Row] | None]:
    """Load the newest checkpoint of a run (see `load`).

    Returns:
        Its step, the state saved with it, and, on rank 0, the rows saved with it.

    Raises:
        UserError: there is none, or it does not load.
    """
    newest = _newest(run_folder)
    rows = _together(lambda: _rows(newest) if dist.get_rank() == 0 else None)
    state = load(newest, trainer)
    return read_meta(newest)["step"], state, rows


def _newest(run_folder: Path) -> Path:
    """The newest checkpoint that rank 0 sees, on all ranks. Other nodes may still see an older one."""
    newest, fault = None, ""
    if dist.get_rank() == 0:
        try:
            newest = latest(run_folder)
            best(run_folder)  # the next save needs it
        except UserError as error:
            fault = str(error)
    newest, fault = from_rank_0((newest, fault))
    if fault or newest is None:
        raise UserError(
            fault or f"There is no checkpoint in {run_folder / 'checkpoints'}; start the run without --resume."
        )
    wait_until_seen(newest / "meta.json")
    return newest


def load(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer, schedule and random states in place; returns `state`.

    All ranks call it, with a trainer that has not stepped yet. Layout, type of the weights and kind of optimizer may
    differ from those that saved. With more ranks those beyond keep the random states they have. The learning rate, its
    schedule, weight decay and betas are those of the trainer's configuration. UserError, on all ranks, if the
    checkpoint is incomplete or damaged, or belongs to another model.
    """
    folder = Path(folder)
    updates, random, state = _together(lambda: _small_files(folder, trainer))
    try:
        load_trainer(folder / "trainer", trainer, updates)
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise UserError(f"{folder / 'trainer'} cannot be loaded: {_reason(error)}. {go_on_without(folder)}.") from error
    if random is not None:
        set_random_states(random)
    return state


def _small_files(folder: Path, trainer: Trainer) -> tuple[int, dict[str, Any] | None, dict[str, Any]]:
    """(updates, this rank's random states if it has some, state) of a checkpoint of the trainer's model.

    Everything but the tensors is read, so that a damaged file is named before the load, which takes minutes.
    """
    meta, state = read_meta(folder), read_state(folder)
    tensors, rank = folder / "trainer", dist.get_rank()
    read_object(tensors / "metadata.json", go_on_without(folder))
    stored = _read(tensors / ".metadata", lambda path: FileSystemReader(str(path.parent)).read_metadata(), folder)
    if not any(key.startswith("common_state") for key in stored.state_dict_metadata):  # Megatron 0.19 stores it there
        _read(tensors / "common.pt", lambda path: dist_checkpointing.load_common_state_dict(path.parent), folder)
    random = None
    if rank < meta["ranks"]:
        # plain values and tensors: loading them executes nothing
        random = _read(folder / "rng" / f"rank_{rank:05d}.pt", lambda path: torch.load(path, weights_only=True), folder)
    if rank == 0:
        check_same_model(folder, trainer.policy)
    return meta["updates"], random, state


def _rows(folder: Path) -> list[Row] | None:
    """The rows of the next update that a checkpoint holds; None: it holds none."""
    count = read_meta(folder).get("rows")
    if count is None:
        return None
    rows = _read(folder / ROWS, read_rows, folder)
    if len(rows) != count:
        raise UserError(
            f"{folder / ROWS} has {len(rows)} rows, and meta.json there says {count}. {go_on_without(folder)}."
        )
    return rows


def _read(path: Path, read: Callable[[Path], Result], folder: Path) -> Result:
    """What `read` returns of a file of a checkpoint; UserError if the file is gone or damaged."""
    if not path.exists():
        raise UserError(f"{path} is missing. {go_on_without(folder)}.")
    try:
        return read(path)
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}. {go_on_without(folder)}.") from error


def _together(action: Callable[[], Result]) -> Result:
    """What an action returns; if it raises a UserError on any rank, all raise it."""
    result, failure = None, ""
    try:
        result = action()
    except UserError as error:
        failure = str(error)
    if failures := list(filter(None, from_all(failure))):
        raise UserError(failures[0])
    return cast(Result, result)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())
    return f"{type(error).__name__}: {error}"
