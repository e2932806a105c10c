"""Hugging Face checkpoints: loading into a Megatron model, saving a stream of tensors."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from spell_megatron.files import appearing_folder
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.hf_checkpoint import TYPES, Checkpoint
from spell_megatron.weights.names import hf_shapes
from spell_megatron.weights.reshard import local_parameters, shard_place
from spell_megatron.weights.side_files import SideFiles, read_side_files, write_side_files
from spell_megatron.weights.weight_files import INDEX, SINGLE


@torch.no_grad()
def load_weights(model: TreeGPTModel, folder: Path | str) -> None:
    """Fill this rank's part of `model` from a Hugging Face checkpoint, one parameter at a time.

    Names and shapes are checked against the configuration before the first parameter changes. Values are
    converted to the type of the parameters.

    Raises:
        UserError: a file or tensor is missing, damaged, unexpected or of the wrong shape.
    """
    folder = Path(folder)
    with Checkpoint(folder) as checkpoint:
        parameters = local_parameters(model, tied_head=True)
        checkpoint.check(model.policy, {n for rule, _ in parameters for n in rule.names})
        for rule, parameter in parameters:
            parameter.copy_(rule.shard([checkpoint.tensor(name) for name in rule.names], *shard_place(rule)))


def save_checkpoint(
    stream: Iterable[tuple[str, Tensor]],
    source_folder: Path | str,
    out_folder: Path | str,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Write a stream of (name, tensor) as a Hugging Face checkpoint, with the side files of another one.

    Args:
        source_folder: checkpoint of the same architecture, from which configuration, tokenizer and chat template come.
        stream, out_folder, shard_bytes: see `write_checkpoint`.

    Raises:
        UserError: as `write_checkpoint`, or a side file cannot be read.
    """
    source = Path(source_folder)
    write_checkpoint(stream, PolicyModel.load(source), read_side_files(source), Path(out_folder), shard_bytes)


def write_checkpoint(
    stream: Iterable[tuple[str, Tensor]],
    policy: PolicyModel,
    side_files: SideFiles,
    out_folder: Path,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Write a stream of (name, tensor) as a Hugging Face checkpoint.

    The folder appears under its name only when it is complete; one that is already there is replaced.

    Args:
        stream: whole tensors of the policy under Hugging Face names, in the order of `names.rules`; read once, one
            tensor held at a time.
        side_files: configuration, tokenizer and chat template.
        out_folder: where to write.
        shard_bytes: most bytes per file; larger models are written as several files and an index.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    with appearing_folder(out_folder) as partial:
        dtype = _write_shards(stream, partial, hf_shapes(policy), shard_bytes)
        write_side_files(side_files, partial, dtype)


def _write_shards(
    stream: Iterable[tuple[str, Tensor]], folder: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: int
) -> torch.dtype:
    """Write the weights and, for more than one file, their index. Returns the type of the tensors."""
    tensors = iter(stream)
    first = next(tensors)
    dtype = first[1].dtype
    tensors = itertools.chain([first], tensors)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE
        weight_map |= dict.fromkeys(names, file)
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype, tensors)
    if extra := next(tensors, None):
        raise RuntimeError(f"the stream goes on after the last tensor of the model with {extra[0]}")
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write the next tensors of a stream as a safetensors file. The format begins with the length of its
    header, which lists names and places, so that a file can be written without holding its tensors."""
    kind = next(name for name, known in TYPES.items() if known == dtype)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, tensor = next(tensors, ("nothing", torch.empty(0)))
            if name != expected or tensor.shape != shape or tensor.dtype != dtype:
                raise RuntimeError(f"the stream has {name} where {expected} of shape {list(shape)} is due")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
