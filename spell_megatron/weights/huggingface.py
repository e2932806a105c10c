"""Hugging Face checkpoints: loading into a Megatron model, saving a stream of tensors."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spell_megatron.errors import UserError
from spell_megatron.files import appearing_folder
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.names import hf_shapes
from spell_megatron.weights.reshard import local_parameters, shard_place

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Types of weights by their names in safetensors files."""

MAPPED_BYTES = 64 << 20

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights that make a checkpoint usable: configuration, tokenizer, chat template."""


class Checkpoint:
    """The tensors of a checkpoint folder, opened file by file and read one by one. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._stack = Path(folder), ExitStack()
        self._opened: dict[str, object] = {}
        self._mapped = 0
        self.files: dict[str, str] = self._locate()
        """File name of each tensor."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _locate(self) -> dict[str, str]:
        """File name of each tensor."""
        if (self.folder / INDEX).is_file():
            try:
                return dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.folder / INDEX} is not an index of safetensors files ({error!r}). Copy it "
                    "again from where the checkpoint came from."
                ) from error
        if not (self.folder / SINGLE).is_file():
            raise UserError(
                f"{self.folder} holds no weights: there is neither {SINGLE} nor {INDEX}. Only safetensors "
                "are read; convert other formats with transformers' save_pretrained."
            )
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str):
        if file not in self._opened:
            path = self.folder / file
            if not path.is_file():
                raise UserError(
                    f"{self.folder / INDEX} names {file}, but that file is missing. Copy the whole checkpoint."
                )
            try:
                self._opened[file] = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is not a complete safetensors file ({error}). It was probably cut short; copy it again."
                ) from error
        return self._opened[file]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor, which lies in the file's pages until it is used."""
        tensor = self._open(self.files[name]).get_tensor(name)
        self._mapped += tensor.nbytes
        if self._mapped > MAPPED_BYTES:  # pages that were read stay in memory as long as the file is open
            self._stack.close()
            self._opened.clear()
            self._mapped = 0
        return tensor

    def dtype(self) -> torch.dtype:
        """The one type of all tensors; UserError if there are several."""
        names = [name for name in self.files if not name.endswith("rotary_emb.inv_freq")]
        types = {name: self._slice(name).get_dtype() for name in names}
        if len(set(types.values())) > 1:
            found = ", ".join(f"{kind} ({next(n for n in types if types[n] == kind)})" for kind in set(types.values()))
            raise UserError(
                f"{self.folder} holds weights of several types: {found}. Save it in one, with transformers' "
                "save_pretrained after model.to(torch.bfloat16), say."
            )
        kind = next(iter(types.values()))
        if kind not in TYPES:
            raise UserError(f"{self.folder} holds weights of type {kind}; {', '.join(TYPES)} can be read.")
        return TYPES[kind]

    def nbytes(self) -> int:
        """Size of the files."""
        return sum((self.folder / file).stat().st_size for file in set(self.files.values()))

    def check(self, policy: PolicyModel, own: set[str]) -> None:
        """All tensors of the model are there, no others are, and those named in `own` have their shapes."""
        shapes = hf_shapes(policy)
        missing = [name for name in shapes if name not in self.files]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} tensors that its config.json asks for, such as "
                f"{missing[0]}. Copy the whole checkpoint, or correct config.json."
            )
        ignored = {"lm_head.weight"} if policy.arch.tied else set()
        unexpected = [
            name
            for name in self.files
            if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq")
        ]
        if unexpected:
            raise UserError(
                f"{self.folder} holds {len(unexpected)} tensors that its config.json does not explain, "
                f"such as {unexpected[0]}. The model would not compute what it was trained to; correct "
                "config.json."
            )
        for name in sorted(shapes.keys() & own, key=lambda name: (self.files[name], name)):
            if self.shape(name) != shapes[name]:
                raise UserError(
                    f"{name} in {self.folder / self.files[name]} has shape "
                    f"{list(self.shape(name))}; config.json asks for {list(shapes[name])}. Weights and "
                    "configuration are of different models."
                )

    def _slice(self, name: str):
        try:
            return self._open(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self.folder / INDEX} places {name} in {self.files[name]}, but it is not there "
                f"({error}). Copy the whole checkpoint."
            ) from error


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
    """Write a stream of (name, tensor) as a Hugging Face checkpoint.

    The folder appears under its name only when it is complete; one that is already there is replaced.
    Configuration, tokenizer and chat template are copied from `source_folder`.

    Args:
        stream: whole tensors under Hugging Face names, in the order of `names.rules`; read once, one tensor
            held at a time.
        source_folder: checkpoint of the same architecture.
        out_folder: where to write.
        shard_bytes: most bytes per file; larger models are written as several files and an index.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    source = Path(source_folder)
    with appearing_folder(Path(out_folder)) as partial:
        dtype = _write_shards(stream, partial, hf_shapes(PolicyModel.load(source)), shard_bytes)
        copy_side_files(source, partial, dtype)


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


def copy_side_files(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy configuration, tokenizer and chat template, and note the weights' type in config.json."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json") and file.name != "metadata.json":
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
