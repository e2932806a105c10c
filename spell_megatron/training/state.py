"""The trainer's state as Megatron's distributed checkpoints hold it: weights, optimizer, schedule and random states.

Megatron saves and loads it in any layout.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import FileSystemReader

from spell_megatron.training.optimizer import optimizer_parts
from spell_megatron.training.optimizer_on_host import state_on_host
from spell_megatron.training.stored_keys import stored_key
from spell_megatron.training.trainer import Trainer


def sharded_state(trainer: Trainer, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
    """What Megatron's `dist_checkpointing` saves of this rank, or loads into it."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {"model": trainer.model.sharded_state_dict(metadata=metadata), "skipped": trainer.skipped}
    if with_optimizer:
        for part in optimizer_parts(trainer.optimizer):
            _pad_buckets(part)
        with state_on_host(trainer.optimizer):
            state["optimizer"] = trainer.optimizer.sharded_state_dict(
                state["model"], is_loading=is_loading, metadata=metadata
            )
            for entry in _tensors(state["optimizer"]):
                entry.data = entry.data.detach()  # of the host's memory also after this
    return state


def _pad_buckets(optimizer) -> None:
    """Correct how Megatron's distributed optimizer finds parameters in its gathered buckets.

    It joins buckets without their padding, but cuts parameters out at places that count it. The second bucket, which
    an embedding shared by pipeline stages gets, would be saved from wrong places.
    """
    gather = getattr(optimizer, "get_parameter_state_dp_zero", None)
    if gather is None or hasattr(optimizer, "pads_buckets"):
        return

    def gather_padded(**options: Any) -> dict[Any, Any]:
        if optimizer.data_parallel_group.size() == 1 and optimizer.data_parallel_group_gloo is not None:
            # There is nothing to gather: Megatron would send this rank's state to itself through its GPU, twice.
            options["use_gloo_comm"] = True
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

    optimizer.pads_buckets = True
    optimizer.get_parameter_state_dp_zero = gather_padded


def load_trainer(folder: Path, trainer: Trainer, updates: int) -> None:
    """Load weights, optimizer and schedule after `updates` updates into a trainer that has made none.

    The checkpoint may be of another layout, type of weights or kind of optimizer (`training.optimizer.distributed`).
    """
    if updates:
        _allocate_state(trainer.optimizer)
    wanted = sharded_state(trainer, with_optimizer=updates > 0, is_loading=True)
    _use_stored_keys(wanted, folder)
    # Under its own name Megatron would mix in the plain values that a checkpoint holds of the optimizer. Their places
    # depend on its kind, and this optimizer has its own.
    tensors = {"tensors of the optimizer": wanted.pop("optimizer", {})}
    loaded = dist_checkpointing.load(wanted, str(folder))
    trainer.model.load_state_dict(loaded["model"])
    if updates:
        # A load of its own, because Megatron lets nobody read a tensor twice in one load, and both may want a weight.
        loaded |= dist_checkpointing.load(tensors, str(folder))
        with state_on_host(trainer.optimizer):
            _load_optimizer(trainer.optimizer, loaded["tensors of the optimizer"], updates)
    else:
        with state_on_host(trainer.optimizer):
            trainer.optimizer.reload_model_params()
    trainer.scheduler.num_steps = updates
    trainer.scheduler.step(0)
    trainer.skipped = loaded["skipped"]


def _use_stored_keys(wanted: dict[str, Any], folder: Path) -> None:
    """Ask for each tensor by the key that it has in this checkpoint."""
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    for entry in _tensors(wanted):
        entry.key = _most_exact(stored_key(entry.key, stored), entry.data.dtype, stored)


def _tensors(state: dict[Any, Any]) -> list[ShardedTensor | ShardedTensorFactory]:
    """The tensors of a state, as Megatron describes them."""
    return [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


_MASTERS = "optimizer.state.param.", "optimizer.state.fp32_param."
"""What stands before a weight's key in the keys of its float32 copies, of the distributed and the other optimizer."""


def _most_exact(key: str, dtype: torch.dtype, stored: Mapping[str, Any]) -> str:
    """The key under which a checkpoint holds a float32 weight or its float32 copy; `key` for anything else.

    Weights in bfloat16 have such a copy. Weights in float32 have one in the distributed optimizer only.
    """
    weight = key
    for master in _MASTERS:
        weight = weight.removeprefix(master)
    copies = [master + weight for master in _MASTERS if master + weight in stored]
    wants_copy = weight != key
    if wants_copy and key not in stored:
        return copies[0] if copies else weight
    rounded = not wants_copy and dtype == torch.float32 and key in stored and stored[key].properties.dtype != dtype
    return copies[0] if copies and rounded else key


def _load_optimizer(optimizer, loaded: dict[Any, Any], updates: int) -> None:
    """Give the optimizer its moments and master weights; everything else it has already.

    The tensors carry names that fit every layout, but the plain values around them (rates, number of steps)
    are kept per Megatron optimizer, of which expert parallelism makes two, in places that depend on its kind. They are
    therefore taken from this optimizer, which also is what lets the configuration change rates.
    """
    own = optimizer_parts(optimizer)
    parts = [loaded] if len(own) == 1 else [loaded[number] for number in range(len(own))]
    for part, member in zip(parts, own, strict=True):
        if "param_state" in part:
            groups = [{**group, "params": [], "step": updates} for group in member.param_groups]
            part |= {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
        else:
            state = part.get("optimizer", part)
            # Here parameters are numbers, to which those of the state refer.
            state["param_groups"] = [{**g, "step": updates} for g in member.optimizer.state_dict()["param_groups"]]
            # torch's AdamW counts the steps of each parameter, and Megatron restores them from this. The Adam of
            # transformer-engine counts those of the group, and refuses others.
            if any("step" in moments for moments in member.optimizer.state.values()):
                state["state"]["common_step"] = torch.tensor(float(updates))
    optimizer.load_state_dict(parts[0] if len(own) == 1 else dict(enumerate(parts)))


def _allocate_state(optimizer) -> None:
    """Make an optimizer that never stepped hold moments, which Megatron needs before it can load them.

    A step with zero gradients, rate and decay creates them without moving a weight.
    """
    for part in optimizer_parts(optimizer):
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


def random_states() -> dict[str, Any]:
    """Random states of this rank as plain values and tensors, so that loading executes nothing."""
    numpy = np.random.get_state(legacy=False)
    twister = numpy["state"]
    states = {
        "python": random.getstate(),
        "numpy": (
            numpy["bit_generator"],
            torch.from_numpy(twister["key"].astype(np.int64)),
            twister["pos"],
            numpy["has_gauss"],
            numpy["gauss"],
        ),
        "torch": torch.get_rng_state(),
        "megatron": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the states of `random_states` in place."""
    version_, internal, gauss_next = states["python"]
    random.setstate((version_, tuple(internal), gauss_next))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
