"""Checkpoints of a run: written beside the old ones, renamed when complete, `latest` replaced last.

Saving starts processes, so that the script that calls it must be safe to import.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import signature
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from spell_megatron.checkpoint.folder import ROWS, best, wait_until_seen
from spell_megatron.config.schema import CheckpointConfig
from spell_megatron.errors import ProcessLost, UserError, explain
from spell_megatron.files import write_text
from spell_megatron.processes.collective import from_all, from_rank_0
from spell_megatron.processes.lifetime import end_with_parent
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.rows_file import write_rows
from spell_megatron.training.state import random_states, sharded_state
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import write_checkpoint
from spell_megatron.weights.reshard import export
from spell_megatron.weights.side_files import SideFiles, read_side_files
from spell_megatron.weights.sizes import checkpoint_bytes
from spell_megatron.weights.untrained import Untrained

_KEPT = "The checkpoints before are untouched, and `--resume` continues from the newest of them."
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
# Megatron-Core 0.19 can write with one of two packages, and takes one for GPUs by default.
_STRATEGY = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


class Saver:
    """Saves a run's checkpoints, one after the other. All ranks call its methods together.

    With `checkpoint.asynchronous`, `save` leaves weights and optimizer to a process of each rank, forked from it so
    that it sees them as they are at that moment, and returns. The checkpoint gets its name in the first `poll` that
    finds all ranks done, in `finish`, or before the next `save`. Leaving the context before that ends the
    processes; what they wrote is removed by the next save.
    """

    def __init__(
        self, run_folder: Path, trainer: Trainer, settings: CheckpointConfig, source: Path, configuration: str
    ) -> None:
        """
        Args:
            source: Hugging Face checkpoint that the run began with; each checkpoint gets its configuration and
                tokenizer, which are read now, and its tensors that are not trained, whose files are opened now.
            configuration: of the run, as JSON.

        Raises:
            UserError: they cannot be read.
        """
        self.root, self._trainer = Path(run_folder) / "checkpoints", trainer
        self._settings, self._configuration = settings, configuration
        self._side_files = read_side_files(source) if dist.get_rank() == 0 else {}
        self._untrained = Untrained(source, trainer.policy) if dist.get_rank() == 0 else None
        self._pending: _Pending | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending:
            self._pending.writer.close(abort=True)
        if self._untrained:
            self._untrained.close()

    @property
    def untrained(self) -> str:
        """Which tensors are not trained, and go into every checkpoint as they are; "": none, or not rank 0."""
        return str(self._untrained) if self._untrained and self._untrained.names else ""

    def save(self, step: int, state: dict[str, Any], rows: Sequence[Row] | None = None) -> None:
        """Write the checkpoint of `step` and delete all but the newest `checkpoint.keep`.

        state: anything that JSON holds; rows: of the next update, if it has them already; rank 0's are written.
        UserError, on all ranks, if the disk is full or cannot be written; the checkpoints before stay as they are.
        """
        self.finish()
        trainer, asynchronous = self._trainer, self._settings.asynchronous
        final = self.root / f"step_{step:06d}"
        pending = _Pending(final, final.with_name(final.name + ".tmp"), _meta(step, trainer, rows))
        partial = pending.partial
        more = self._untrained.nbytes if self._untrained else 0
        _on_rank_0(lambda: _prepare(self.root, partial, trainer, more), self.root)
        self._pending = pending

        def write() -> None:
            _start_manager()
            for made in ("trainer", "rng"):
                wait_until_seen(partial / made)
            pending.start(partial / "trainer", trainer, asynchronous)
            _save_hf(partial / "hf", trainer, self._side_files, self._untrained)
            torch.save(random_states(), partial / "rng" / f"rank_{dist.get_rank():05d}.pt")
            if dist.get_rank() == 0:
                write_text(partial / "state.json", json.dumps(state), sync=True)
                write_text(partial / "config.json", self._configuration, sync=True)
                if rows is not None:
                    write_rows(partial / ROWS, rows)

        self._attempt(pending, write)
        if not asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their part."""
        if self._pending and self._pending.writer.is_current_async_call_done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and complete it.

        UserError, on all ranks, if a process failed to write its part; the checkpoints before stay as they are.
        """
        pending = self._pending
        if not pending:
            return
        self._attempt(pending, pending.wait)
        self._pending = None
        _on_rank_0(lambda: _complete(pending, self._settings.keep), self.root)

    def _attempt(self, pending: _Pending, action: Callable[[], None]) -> None:
        """A part of saving; if it fails on any rank, the checkpoint is given up on all."""
        failure: Exception | None = None
        try:
            action()
        except (UserError, ProcessLost) as error:
            failure = error
        except CheckpointException as error:  # only rank 0 has the reasons
            reasons = [f"rank {rank}: {_reason(reason, self.root)}" for rank, (reason, _) in error.failures.items()]
            failure = _write_failed(self.root, "; ".join(reasons))
        except (EOFError, ConnectionError) as error:  # of the pipe to the manager: the disk has no part in it
            failure = _writer_lost(self.root, f"{type(error).__name__}: {error}")
        except (OSError, RuntimeError, CheckpointingException, SafetensorError) as error:
            failure = _write_failed(self.root, _reason(error, self.root))
        failures = list(filter(None, from_all(failure)))
        if failures:
            self._pending = None
            pending.writer.close(abort=True)
            _on_rank_0(lambda: shutil.rmtree(pending.partial, ignore_errors=True), self.root)
            raise failures[0]


class _Pending:
    """A checkpoint that is not complete yet.

    Attributes:
        final, partial: its folder, and the one that gets that name when it is complete.
        meta: what meta.json will say.
        writer: the process that writes this rank's part of weights and optimizer, if there is one.
    """

    def __init__(self, final: Path, partial: Path, meta: dict[str, Any]) -> None:
        self.final, self.partial, self.meta = final, partial, meta
        self.writer = TemporalAsyncCaller()
        self._request: AsyncRequest | None = None
        self._process: BaseProcess | None = None

    def start(self, folder: Path, trainer: Trainer, asynchronous: bool) -> None:
        """Write weights and optimizer, or start the process that does."""
        # Before its first step an optimizer has no state, and Megatron cannot save it; a new one is the same.
        state = sharded_state(trainer, with_optimizer=trainer.scheduler.num_steps > 0, is_loading=False)
        if asynchronous:
            self._request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **_STRATEGY)
            self.writer.schedule_async_call(self._request)
            self._process = self.writer.process
        else:
            dist_checkpointing.save(state, str(folder))

    def wait(self) -> None:
        """Wait for the process; all ranks together then write what describes their parts."""
        self.writer.is_current_async_call_done(blocking=True, no_dist=True)
        statuses = from_all(self._process.exitcode or 0 if self._process else 0)
        if min(statuses) < 0:
            raise _writer_lost(self.final.parent, f"signal {-min(statuses)}")
        for finalize in self._request.finalize_fns if self._request else ():
            finalize()


def _save_hf(folder: Path, trainer: Trainer, side_files: SideFiles, untrained: Untrained | None) -> None:
    """Rank 0 writes; every rank goes through the whole stream, since ranks gather tensors together."""
    weights = export(trainer.model)
    try:
        if untrained:  # on rank 0
            write_checkpoint(weights, trainer.policy, side_files, untrained, folder)
    finally:
        for _ in weights:
            pass


def _prepare(root: Path, partial: Path, trainer: Trainer, more: int) -> None:
    """Remove what interrupted saves left, make the folder, and see that the checkpoint, and `more` bytes, will fit."""
    for left in root.glob("step_*.tmp"):
        shutil.rmtree(left)
    for name in ("trainer", "rng"):
        (partial / name).mkdir(parents=True)
    needed = checkpoint_bytes(trainer.policy) + more
    free = shutil.disk_usage(root).free
    if free < needed:
        shutil.rmtree(partial)
        raise UserError(
            f"A checkpoint takes about {needed / 1e9:.1f} GB, but {root} has {free / 1e9:.1f} GB left. Free "
            "some space, lower checkpoint.keep, or point run.output_dir at another disk."
        )


def _meta(step: int, trainer: Trainer, rows: Sequence[Row] | None) -> dict[str, Any]:
    return {
        "step": step,
        **({} if rows is None else {"rows": len(rows)}),
        "updates": trainer.scheduler.num_steps,
        "ranks": dist.get_world_size(),
        "vocabulary": trainer.policy.arch.vocabulary,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _start_manager() -> None:
    """Start the process by which Megatron's writers report. Megatron's own would outlive a trainer that is killed.

    It ends with the trainer and cannot remove anything then. So its socket has a name of Linux (it begins with a zero)
    in place of a file in a temporary folder.
    """
    if filesystem_async._results_queue is None:
        address = f"\0spell-{uuid.uuid4()}"
        manager = SyncManager(address, ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()  # keeps the manager


def _complete(pending: _Pending, keep: int) -> None:
    """Rank 0: meta.json, then rename, then `latest`, then delete old checkpoints."""
    final, partial = pending.final, pending.partial
    root = final.parent
    write_text(partial / "meta.json", json.dumps(pending.meta, indent=2), sync=True)
    replaced = final.with_name(final.name + ".old")
    if final.exists():  # a step saved again
        final.rename(replaced)
    partial.rename(final)
    write_text(root / "latest", final.name, sync=True)
    shutil.rmtree(replaced, ignore_errors=True)
    kept = sorted(path for path in root.glob("step_*") if path.suffix == "")[-keep:]
    kept += [final, root / str(best(root.parent).get("checkpoint"))]
    for path in root.glob("step_*"):
        if path not in kept:
            shutil.rmtree(path)


def _on_rank_0(action: Callable[[], None], root: Path) -> None:
    """Run on rank 0 while the others wait; its failure is everyone's UserError."""
    failure = ""
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = str(_write_failed(root, _reason(error, root)))
    if failure := from_rank_0(failure):
        raise UserError(failure)


def _write_failed(root: Path, reason: str) -> UserError:
    return UserError(f"Writing a checkpoint to {root} failed: {reason}. {_KEPT}")


def _reason(error: BaseException, root: Path) -> str:
    """Why a write below `root` failed, and the remedy."""
    cause = error if isinstance(error, OSError) else _refused(root)
    explanation = explain(cause) if cause else None
    return f"{type(error).__name__}: {error}" + (f" ({explanation})" if explanation else "")


def _refused(root: Path) -> OSError | None:
    """Why nothing can be written to a folder: torch's errors do not say it."""
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _writer_lost(root: Path, reason: str) -> ProcessLost:
    return ProcessLost(
        f"A process that wrote a checkpoint to {root} was killed ({reason}), perhaps because memory was short. {_KEPT}"
    )
