"""Whether engines compute with the weights of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import torch
from torch import Tensor

from spell_megatron.errors import UserError
from spell_megatron.rollout.checksum import checksum
from spell_megatron.rollout.engine import Engine
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.hf_checkpoint import Checkpoint
from spell_megatron.weights.megatron import MegatronCheckpoint, locate
from spell_megatron.weights.names import hf_shapes
from spell_megatron.weights.weight_files import INDEX, SINGLE


@dataclass(frozen=True)
class Difference:
    """A tensor whose values in an engine and in the checkpoint differ.

    Attributes:
        name: Hugging Face name of the tensor.
        engine: address of the engine.
        checkpoint: checksum of the first block that differs, in the checkpoint; or why there is none.
        held: the same in the engine.
    """

    name: str
    engine: str
    checkpoint: str
    held: str


def read_checkpoint(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (Hugging Face name, tensor) of a checkpoint, one at a time.

    Args:
        folder: of a Hugging Face checkpoint, a Megatron distributed checkpoint or a step of a run.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or of an unknown kind.
    """
    if not _has_safetensors(folder):
        yield from MegatronCheckpoint(folder).tensors()
        return
    policy = PolicyModel.load(folder)
    with Checkpoint(folder, policy) as checkpoint:
        checkpoint.check(set(checkpoint.files))
        for name in hf_shapes(policy):
            yield name, checkpoint.tensor(name)


def side_files(folder: Path) -> Path:
    """Where the config.json of a checkpoint is."""
    return folder if _has_safetensors(folder) else locate(folder)[1]


def _has_safetensors(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (SINGLE, INDEX))


def compare(
    stream: Iterable[tuple[str, Tensor]], engines: list[Engine], on_tensor: Callable[[int], None] | None = None
) -> tuple[int, list[Difference]]:
    """Compare what engines compute with, read back from their kernels, with the tensors of a stream.

    Blocks of a tensor that several workers hold are compared in each of them. Values are converted to the type in
    which the engine holds them.

    Args:
        on_tensor: called with the number of tensors compared so far.

    Returns:
        The number of tensors of both sides, and the differences, at most one for each tensor and engine.

    Raises:
        UserError: an engine does not answer, cannot be read back or took other weights meanwhile.
    """
    before = [_version(engine) for engine in engines]
    held = [_held(engine) for engine in engines]
    count, differences = 0, []
    for name, tensor in stream:
        count += 1
        expected: dict[tuple, str] = {}  # replicas hold the same blocks
        for engine, blocks in zip(engines, held, strict=True):
            found = _difference(name, tensor, blocks.pop(name, []), expected)
            if found:
                differences.append(Difference(name, engine.url, *found))
        if on_tensor:
            on_tensor(count)
    count += len(set().union(*held))
    for engine, blocks in zip(engines, held, strict=True):
        differences += [Difference(name, engine.url, "nothing", blocks[name][0][-1]) for name in blocks]
    for engine, version in zip(engines, before, strict=True):
        if _version(engine) != version:
            raise UserError(
                f"{engine.url} took other weights while they were compared. Compare again while no update runs."
            )
    return count, differences


def _difference(name: str, tensor: Tensor, blocks: list, expected: dict[tuple, str]) -> tuple[str, str] | None:
    """(checkpoint's, engine's) checksum of the first block that differs."""
    regions = set()
    for start, shape, dtype, found in blocks:
        key = (*start, *shape, dtype)
        if key not in expected:
            block = tensor[tuple(slice(a, a + size) for a, size in zip(start, shape))]
            expected[key] = checksum(block.to(getattr(torch, dtype)) + 0.0)
        if found != expected[key]:
            return expected[key], found
        regions.add((tuple(start), tuple(shape)))
    elements = sum(math.prod(shape) for _, shape in regions)
    if elements != tensor.numel():
        return f"{tensor.numel()} elements", f"{elements} of them"
    return None


def _held(engine: Engine) -> dict[str, list]:
    """Blocks (start, shape, dtype, checksum) of each tensor in all workers of an engine."""
    try:
        workers = engine.call("spell_weights", timeout=3600)
    except requests.RequestException as error:
        raise UserError(f"The weights of {engine.url} could not be read back: {error}") from error
    blocks: dict[str, list] = {}
    for worker in workers:
        for name, *block in worker:
            blocks.setdefault(name, []).append(block)
    return blocks


def _version(engine: Engine) -> str:
    try:
        return engine.get("/weight_info")["weight_version"]
    except requests.ConnectionError as error:
        raise UserError(f"Nothing answers at {engine.url}. Start the engine, or correct the address.") from error
    except (requests.RequestException, ValueError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise UserError(
                f"The engine at {engine.url} refuses the API key. Set SPELL_API_KEY to the key it was started with."
            ) from error
        raise UserError(
            f"{engine.url} does not say which weights it has ({error}). It must be an engine that spell_megatron "
            "started, or one that was started as `spell train --dry-run` shows it, with VLLM_SERVER_DEV_MODE=1."
        ) from error
