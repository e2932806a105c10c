"""Checkpoints of a run: written beside the old ones, renamed when complete, `latest` replaced last.

`<run>/checkpoints/step_000010/` holds

    trainer/       weights, optimizer and schedule (Megatron's torch_dist format, loads in any layout)
    hf/            the weights as a Hugging Face checkpoint
    state.json     what the caller gave: step, history, sampler, ...
    rng/           random states of each rank
    config.json    the configuration that the run had
    meta.json      step, optimizer steps, ranks, versions; its presence marks a complete checkpoint

and `<run>/checkpoints/latest` names the newest one. All ranks must see the same file system. Saving
starts processes, so that the script that calls it must be safe to import.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import random
import shutil
from collections.abc import Callable
from importlib.metadata import version
from inspect import signature
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from torch.distributed.checkpoint.api import CheckpointException

from spell_megatron.errors import UserError
from spell_megatron.files import write_text
from spell_megatron.processes.lifetime import end_with_parent
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import save_checkpoint
from spell_megatron.weights.reshard import export

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

    def __init__(self, run_folder: Path, trainer: Trainer) -> None:
        self._root, self._trainer = Path(run_folder) / "checkpoints", trainer
        self._pending: _Pending | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending:
            self._pending.writer.close(abort=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step` and delete all but the newest `checkpoint.keep`.

        state: anything that JSON holds; rank 0's is written. UserError, on all ranks, if the disk is full or
        cannot be written; the checkpoints before stay as they are.
        """
        self.finish()
        trainer, asynchronous = self._trainer, self._trainer.config.checkpoint.asynchronous
        final = self._root / f"step_{step:06d}"
        pending = _Pending(final, final.with_name(final.name + ".tmp"), _meta(step, trainer))
        partial = pending.partial
        _on_rank_0(lambda: _prepare(self._root, partial, trainer), self._root)
        self._pending = pending

        def write() -> None:
            _start_manager()
            pending.start(partial / "trainer", trainer, asynchronous)
            _save_hf(partial / "hf", trainer)
            torch.save(_random_states(), partial / "rng" / f"rank_{dist.get_rank():05d}.pt")
            if dist.get_rank() == 0:
                write_text(partial / "state.json", json.dumps(state), sync=True)
                write_text(partial / "config.json", trainer.config.model_dump_json(indent=2), sync=True)

        self._attempt(write)
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
        self._attempt(pending.wait)
        self._pending = None
        _on_rank_0(lambda: _complete(pending, self._trainer.config.checkpoint.keep), self._root)

    def _attempt(self, action: Callable[[], None]) -> None:
        """A part of saving; if it fails on any rank, the checkpoint is given up on all."""
        try:
            action()
            failure = ""
        except UserError as error:
            failure = str(error)
        except CheckpointException as error:  # only rank 0 has the reasons
            reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items()]
            failure = _write_failed(self._root, "; ".join(reasons))
        except (OSError, RuntimeError, CheckpointingException) as error:
            failure = _write_failed(self._root, f"{type(error).__name__}: {error}")
        failures = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if any(failures):
            pending, self._pending = self._pending, None
            pending.writer.close(abort=True)
            _on_rank_0(lambda: shutil.rmtree(pending.partial, ignore_errors=True), self._root)
            raise UserError(next(filter(None, failures)))


def save(run_folder: Path, step: int, trainer: Trainer, state: dict[str, Any]) -> Path:
    """Write one checkpoint and wait until it is complete (see `Saver.save`); returns its folder."""
    with Saver(run_folder, trainer) as saver:
        saver.save(step, state)
        saver.finish()
    return Path(run_folder) / "checkpoints" / f"step_{step:06d}"


def latest(run_folder: Path) -> Path | None:
    """Folder of the newest checkpoint of a run; None if it has none. UserError if it is incomplete."""
    root = Path(run_folder) / "checkpoints"
    pointer = root / "latest"
    if not pointer.exists():
        return None
    folder = root / pointer.read_text(encoding="utf-8").strip()
    _check_complete(folder)
    return folder


def best(run_folder: Path) -> dict[str, Any]:
    """Which checkpoint of a run did best on its held-out questions: {"checkpoint", "score"}; {} if none is known."""
    path = Path(run_folder) / "checkpoints" / "best.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note_score(run_folder: Path, step: int, score: float) -> None:
    """Rank 0: if the checkpoint of `step` did better than the best one, keep it instead of that one."""
    root = Path(run_folder) / "checkpoints"
    if score > best(run_folder).get("score", -math.inf):
        record = {"checkpoint": f"step_{step:06d}", "score": score}
        write_text(root / "best.json", json.dumps(record), sync=True)


def load(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer, schedule and random states in place; returns `state`.

    All ranks call it, with a trainer that has not stepped yet. The layout of ranks may differ from the
    one that saved; then ranks beyond those that saved keep the random states they have. The learning
    rate, its schedule, weight decay and betas are those of the trainer's configuration. UserError if the
    checkpoint is incomplete or belongs to another model.
    """
    folder = Path(folder)
    _check_complete(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    updates = meta["updates"]
    # Megatron loads a vocabulary of another size without a word, because its padding may differ.
    if meta["vocabulary"] != trainer.hf_config.vocab_size:
        raise UserError(
            f"The checkpoint {folder} was made with a vocabulary of {meta['vocabulary']} tokens, but the model of "
            f"model.path has {trainer.hf_config.vocab_size}. Set model.path to the model that the run began with."
        )
    try:
        _load_trainer(folder / "trainer", trainer, updates)
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise UserError(
            f"The checkpoint {folder} does not load into this model ({type(error).__name__}: {error}). "
            f"Check that model.path is the model the run began with (see {folder / 'config.json'}), or "
            "remove the folder and resume from an older checkpoint."
        ) from error
    random_states = folder / "rng" / f"rank_{dist.get_rank():05d}.pt"
    if random_states.exists():
        _set_random_states(torch.load(random_states, weights_only=True))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _sharded_state(trainer: Trainer, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {"model": trainer.model.sharded_state_dict(metadata=metadata), "skipped": trainer.skipped}
    if with_optimizer:
        for part in _parts(trainer.optimizer):
            _pad_buckets(part)
        state["optimizer"] = trainer.optimizer.sharded_state_dict(
            state["model"], is_loading=is_loading, metadata=metadata
        )
    return state


def _parts(optimizer) -> list[Any]:
    """The optimizers that Megatron's optimizer is made of: one, or with expert parallelism two."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _pad_buckets(optimizer) -> None:
    """Mend how Megatron's distributed optimizer finds parameters in its gathered buckets.

    It joins buckets without their padding, but cuts parameters out at places that count it. The second bucket, which
    an embedding shared by pipeline stages gets, would be saved from wrong places.
    """
    gather = getattr(optimizer, "get_parameter_state_dp_zero", None)
    if gather is None or hasattr(gather, "pads_buckets"):
        return

    def gather_padded(**options: Any) -> dict[Any, Any]:
        state = gather(**options)
        for number, buffer in enumerate(optimizer.buffers):
            sizes = [(bucket.numel_unpadded, bucket.grad_data.numel()) for bucket in buffer.buckets]
            if len(sizes) == 1:
                continue
            for tensors in state[number].values():
                for name, tensor in tensors.items():
                    if torch.is_tensor(tensor):
                        pieces = tensor.split([size for size, _ in sizes])
                        padded = [F.pad(piece, (0, whole - size)) for piece, (size, whole) in zip(pieces, sizes)]
                        tensors[name] = torch.cat(padded)
        return state

    gather_padded.pads_buckets = True
    optimizer.get_parameter_state_dp_zero = gather_padded


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

    def start(self, folder: Path, trainer: Trainer, asynchronous: bool) -> None:
        """Write weights and optimizer, or start the process that does."""
        # Before its first step an optimizer has no state, and Megatron cannot save it; a new one is the same.
        state = _sharded_state(trainer, with_optimizer=trainer.scheduler.num_steps > 0, is_loading=False)
        if asynchronous:
            self._request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **_STRATEGY)
            self.writer.schedule_async_call(self._request)
        else:
            dist_checkpointing.save(state, str(folder))

    def wait(self) -> None:
        """Wait for the process; all ranks together then write what describes their parts."""
        self.writer.is_current_async_call_done(blocking=True, no_dist=True)
        for finalize in self._request.finalize_fns if self._request else ():
            finalize()


def _save_hf(folder: Path, trainer: Trainer) -> None:
    """Rank 0 writes; every rank goes through the whole stream, since ranks gather tensors together."""
    weights = export(trainer.model, trainer.hf_config)
    try:
        if dist.get_rank() == 0:
            save_checkpoint(weights, trainer.config.model.path, folder)
    finally:
        for _ in weights:
            pass


def _load_trainer(folder: Path, trainer: Trainer, updates: int) -> None:
    if updates:
        _allocate_state(trainer.optimizer)
    wanted = _sharded_state(trainer, with_optimizer=updates > 0, is_loading=True)
    loaded = dist_checkpointing.load(wanted, str(folder))
    trainer.model.load_state_dict(loaded["model"])
    if updates:
        _load_optimizer(trainer.optimizer, loaded["optimizer"], updates)
    else:
        trainer.optimizer.reload_model_params()
    trainer.scheduler.num_steps = updates
    trainer.scheduler.step(0)
    trainer.skipped = loaded["skipped"]


def _load_optimizer(optimizer, loaded: dict[Any, Any], updates: int) -> None:
    """Give the optimizer its moments and master weights; everything else it has already.

    The tensors carry names that fit every layout, but the plain values around them (rates, number of steps)
    are kept per Megatron optimizer, of which expert parallelism makes two. They are therefore taken from this
    optimizer, which also is what lets the configuration change rates.
    """
    own = _parts(optimizer)
    parts = [loaded] if len(own) == 1 else [loaded[number] for number in range(len(own))]
    for part, member in zip(parts, own, strict=True):
        groups = [
            {name: value for name, value in group.items() if name != "params"} | {"step": updates}
            for group in member.param_groups
        ]
        if "param_state" in part:
            part |= {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
        else:
            state = part.get("optimizer", part)
            for group, ours in zip(state["param_groups"], groups, strict=True):
                group.update(ours)
            state["state"]["common_step"] = torch.tensor(float(updates))
    optimizer.load_state_dict(parts[0] if len(own) == 1 else dict(enumerate(parts)))


def _allocate_state(optimizer) -> None:
    """Make an optimizer that never stepped hold moments, which Megatron needs before it can load them.

    A step with zero gradients, rate and decay creates them without moving a weight.
    """
    for part in _parts(optimizer):
        inner = part.optimizer
        if inner is None or len(inner.state):
            continue
        kept = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in inner.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        inner.step()
        for parameter in parameters:
            parameter.grad = None
        for group, (lr, weight_decay) in zip(inner.param_groups, kept):
            group["lr"], group["weight_decay"] = lr, weight_decay


def _random_states() -> dict[str, Any]:
    """Random states of this rank as plain values and tensors, so that loading executes nothing."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "megatron": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    version_, internal, gauss_next = states["python"]
    random.setstate((version_, tuple(internal), gauss_next))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _prepare(root: Path, partial: Path, trainer: Trainer) -> None:
    """Remove what interrupted saves left, make the folder, and see that the checkpoint will fit."""
    for left in root.glob("step_*.tmp"):
        shutil.rmtree(left)
    for name in ("trainer", "rng"):
        (partial / name).mkdir(parents=True)
    needed = _bytes_needed(trainer)
    free = shutil.disk_usage(root).free
    if free < needed:
        shutil.rmtree(partial)
        raise UserError(
            f"A checkpoint takes about {needed / 1e9:.1f} GB, but {root} has {free / 1e9:.1f} GB left. Free "
            "some space, lower checkpoint.keep, or point run.output_dir at another disk."
        )


def _bytes_needed(trainer: Trainer) -> int:
    """Weights twice (trainer and Hugging Face) and, in float32, master weights and two moments."""
    sizes = trainer.model.config
    dense = sizes.tensor_model_parallel_size
    experts = sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size
    local = sum(
        p.numel() * (2 * p.element_size() + 12) * (dense if getattr(p, "allreduce", True) else experts)
        for p in trainer.model.parameters()
    )
    return local * sizes.pipeline_model_parallel_size


def _meta(step: int, trainer: Trainer) -> dict[str, Any]:
    return {
        "step": step,
        "updates": trainer.scheduler.num_steps,
        "ranks": dist.get_world_size(),
        "vocabulary": trainer.hf_config.vocab_size,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _start_manager() -> None:
    """Start the process by which Megatron's writers report. Megatron's own would outlive a trainer that is killed."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
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


def _check_complete(folder: Path) -> None:
    if (folder / "meta.json").exists():
        return
    others = sorted(path.parent.name for path in folder.parent.glob("step_*/meta.json"))
    remedy = "There is no complete one beside it; start the run anew."
    if others:
        pointer = folder.parent / "latest"
        remedy = f"Complete ones are {', '.join(others)}: write one of these names into {pointer}."
    fault = "is incomplete" if folder.exists() else "does not exist"
    raise UserError(f"The checkpoint {folder} {fault}. {remedy}")


def _on_rank_0(action: Callable[[], None], root: Path) -> None:
    """Run on rank 0 while the others wait; its failure is everyone's UserError."""
    failure = [""]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            failure = [str(error)]
        except OSError as error:
            failure = [_write_failed(root, str(error))]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise UserError(failure[0])


def _write_failed(root: Path, reason: str) -> str:
    return (
        f"Writing a checkpoint to {root} failed: {reason}. See that the disk has space and can be written by "
        "this user; the checkpoints before are untouched, and `--resume` continues from the newest of them."
    )
