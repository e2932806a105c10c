"""Hugging Face checkpoints: loading into a Megatron model, saving a stream of tensors."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from spell_megatron.files import appearing_folder
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.hf_checkpoint import TYPES, Checkpoint
from spell_megatron.weights.names import stored_tensors
from spell_megatron.weights.reshard import local_parameters, shard_place
from spell_megatron.weights.side_files import SideFiles, read_side_files, write_side_files
from spell_megatron.weights.untrained import Untrained
from spell_megatron.weights.weight_files import INDEX, SINGLE, write_header

Stored = dict[str, dict[str, tuple[int, ...]]]
"""What each stored tensor holds (see `names.stored_tensors`)."""


@torch.no_grad()
def load_weights(model: TreeGPTModel, folder: Path | str) -> None:
    """Fill this rank's part of `model` from a Hugging Face checkpoint, one parameter at a time.

    Names and shapes are checked against the configuration before the first parameter changes. Values are
    converted to the type of the parameters.

    Raises:
        UserError: a file or tensor is missing, damaged, unexpected or of the wrong shape.
    """
    folder = Path(folder)
    with Checkpoint(folder, model.policy) as checkpoint:
        parameters = local_parameters(model, tied_head=True)
        checkpoint.check({n for rule, _ in parameters for n in rule.names})
        for rule, parameter in parameters:
            parameter.copy_(rule.shard([checkpoint.tensor(name) for name in rule.names], *shard_place(rule)))


def save_checkpoint(
    stream: Iterable[tuple[str, Tensor]],
    source_folder: Path | str,
    out_folder: Path | str,
    shard_bytes: int = 2_000_000_000,
    types: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write a stream of (name, tensor) as a Hugging Face checkpoint, with all else that another one holds.

    Args:
        source_folder: checkpoint of the same architecture, also one of Megatron's, from which configuration, tokenizer
            and chat template come, and the tensors that are not trained.
        stream, out_folder, shard_bytes, types: see `write_checkpoint`.

    Raises:
        UserError: as `write_checkpoint`, or a side file cannot be read.
    """
    source = Path(source_folder)
    policy = PolicyModel.load(source)
    with Untrained(source, policy) as untrained:
        write_checkpoint(stream, policy, read_side_files(source), untrained, Path(out_folder), shard_bytes, types)


def write_checkpoint(
    stream: Iterable[tuple[str, Tensor]],
    policy: PolicyModel,
    side_files: SideFiles,
    untrained: Untrained,
    out_folder: Path,
    shard_bytes: int = 2_000_000_000,
    types: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write a stream of (name, tensor) as a Hugging Face checkpoint.

    The folder appears under its name only when it is complete; one that is already there is replaced.

    Args:
        stream: whole tensors of the policy under Hugging Face names, in the order of `names.rules`; read once, one
            tensor held at a time.
        side_files: configuration, tokenizer and chat template.
        untrained: what else the checkpoint shall hold.
        out_folder: where to write.
        shard_bytes: most bytes per file; larger models are written as several files and an index.
        types: of the tensors, if they are not all of the first one's.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    with appearing_folder(out_folder) as partial:
        dtype = _write_shards(stream, partial, stored_tensors(policy), untrained, shard_bytes, types)
        write_side_files(side_files, partial, dtype)


def _write_shards(
    stream: Iterable[tuple[str, Tensor]],
    folder: Path,
    stored: Stored,
    untrained: Untrained,
    shard_bytes: int,
    types: Mapping[str, torch.dtype],
) -> torch.dtype:
    """Write the weights and, for more than one file, their index. Returns the type of most tensors."""
    tensors = iter(stream)
    first = next(tensors)
    dtype = first[1].dtype
    tensors = itertools.chain([first], tensors)
    specs = {name: _Spec(types.get(next(iter(parts)), dtype), parts) for name, parts in stored.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    count = len(groups) + bool(untrained.names)
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE for n in range(count)]
    weight_map: dict[str, str] = {}
    for names, file in zip(groups, files):
        weight_map |= dict.fromkeys(names, file)
        _write_file(folder / file, {name: specs[name] for name in names}, tensors)
    if extra := next(tensors, None):
        raise RuntimeError(f"the stream goes on after the last tensor of the model with {extra[0]}")
    if untrained.names:
        untrained.write(folder / files[-1])
        weight_map |= dict.fromkeys(untrained.names, files[-1])
    if count > 1:
        total = sum(spec.nbytes for spec in specs.values()) + untrained.nbytes
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return Counter(spec.dtype for spec in specs.values()).most_common(1)[0][0]


@dataclass(frozen=True)
class _Spec:
    """What is known of a stored tensor before it comes."""

    dtype: torch.dtype
    parts: dict[str, tuple[int, ...]]
    """Names and shapes of those of the stream that it holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        (shape,) = set(self.parts.values())
        return shape if len(self.parts) == 1 else (len(self.parts), *shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _write_file(path: Path, specs: dict[str, _Spec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write the next tensors of a stream as a safetensors file."""
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    with path.open("wb") as file:
        write_header(file, {name: (kinds[spec.dtype], spec.shape, spec.nbytes) for name, spec in specs.items()})
        due = ((*part, spec.dtype) for spec in specs.values() for part in spec.parts.items())
        for expected, shape, dtype in due:
            name, tensor = next(tensors, ("nothing", torch.empty(0)))
            if name != expected or tensor.shape != shape or tensor.dtype != dtype:
                raise RuntimeError(f"the stream has {name} where {expected} of shape {list(shape)} is due")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
