"""What a checkpoint holds beside the trained language model: a vision tower, layers that predict further tokens.

These tensors go from checkpoint to checkpoint as the bytes that they are. A Hugging Face checkpoint has them in one of
its files, a Megatron checkpoint in a file of its own.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from spell_megatron.errors import UserError
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.weight_files import INDEX, SINGLE, read_header, read_index, write_header

FILE = "untrained.safetensors"
"""Name of their file in a Megatron checkpoint."""
COMMON, KEY = "common.pt", "untrained"
"""Where a Megatron checkpoint that was converted lists their names."""
_BLOCK = 16 << 20


@dataclass(frozen=True)
class _Place:
    file: str
    kind: str
    """Type of the tensor, as safetensors names it."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file."""
    nbytes: int


class Untrained:
    """These tensors of one checkpoint. A context manager: the files stay open, so that they may be moved meanwhile.

    Args:
        folder: of a Hugging Face or a Megatron checkpoint.
        policy: what its config.json says.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, policy: PolicyModel) -> None:
        self._stack, self._folder = ExitStack(), folder
        self._files: dict[str, tuple[BinaryIO, float]] = {}
        self._places: dict[str, _Place] = {}
        index = _listed(folder) if policy.untrained else {}
        for file in _files(folder, index) if policy.untrained else ():
            header, start = read_header(folder / file)
            for name, about in header.items():
                if name.startswith(policy.untrained) and index.get(name, file) == file:
                    begin, end = about["data_offsets"]
                    self._places[name] = _Place(file, about["dtype"], tuple(about["shape"]), start + begin, end - begin)
        if lost := [name for name in index if name.startswith(policy.untrained) and name not in self._places]:
            raise UserError(
                f"{lost[0]} belongs in {folder / index[lost[0]]}, but it is not there. Copy the whole checkpoint."
            )
        for file in sorted({place.file for place in self._places.values()}):
            opened = self._stack.enter_context((folder / file).open("rb"))
            self._files[file] = opened, os.fstat(opened.fileno()).st_mtime

    def __enter__(self) -> Untrained:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._places)

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self._places.values())

    def __str__(self) -> str:
        beginnings = sorted({".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in self.names})
        return f"{len(self.names)} tensors of {' and '.join(beginnings)} ({self.nbytes / 1e9:.2f} GB)"

    def write(self, path: Path) -> None:
        """Write them as a safetensors file.

        Raises:
            UserError: the files that they come from were changed since they were opened.
        """
        with path.open("wb") as file:
            write_header(file, {name: (place.kind, place.shape, place.nbytes) for name, place in self._places.items()})
            for name in self._places:
                for block in self._blocks(name):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def first_difference(self, other: Untrained) -> str:
        """Name of the first tensor that the other checkpoint lacks or holds with other bits; "": there is none."""
        for name in dict.fromkeys([*self._places, *other._places]):
            kinds = [
                (places[name].kind, places[name].shape) if name in places else None
                for places in (self._places, other._places)
            ]
            if kinds[0] != kinds[1] or any(a != b for a, b in zip(self._blocks(name), other._blocks(name))):
                return name
        return ""

    def _blocks(self, name: str) -> Iterator[bytes]:
        place = self._places[name]
        file, changed = self._files[place.file]
        file.seek(place.start)
        for left in range(place.nbytes, 0, -_BLOCK):
            block = file.read(min(_BLOCK, left))
            if len(block) < min(_BLOCK, left) or os.fstat(file.fileno()).st_mtime != changed:
                raise UserError(
                    f"{self._folder / place.file} was changed while it was needed: {name} goes into every checkpoint "
                    "as it was. Put the file back, and leave it as it is."
                )
            yield block


def note(names: list[str], folder: Path) -> None:
    """Say in a Megatron checkpoint, beside Megatron's own, which of these tensors belong to it."""
    torch.save({KEY: names} if names else {}, folder / COMMON)


def _listed(folder: Path) -> dict[str, str]:
    """The files of the tensors that the index of a checkpoint lists, or of those that `note` has named."""
    if (folder / INDEX).is_file():
        return read_index(folder)
    try:
        common = torch.load(folder / COMMON, weights_only=True) if (folder / COMMON).is_file() else {}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder / COMMON} is damaged ({error}). Copy the whole checkpoint.") from error
    return dict.fromkeys(common.get(KEY, ()), FILE)


def _files(folder: Path, index: Mapping[str, str]) -> list[str]:
    """Names of the files of a checkpoint, which may hold tensors that its index does not list."""
    if index and set(index.values()) != {FILE}:
        return sorted(set(index.values()))
    return [file for file in (SINGLE, FILE) if (folder / file).is_file()][:1]
