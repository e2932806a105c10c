"""The safetensors files of a Hugging Face checkpoint: whether they are complete, and what stands at their beginning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from spell_megatron.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_index(folder: Path) -> dict[str, str]:
    """The file name of each tensor, from the index of a checkpoint. UserError if that is no index."""
    path = folder / INDEX
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [file for file in files.values() if not isinstance(file, str) or Path(file).name != file]
        reason = f"{wrong[0]!r} is no name of a file" if wrong else "" if files else "it names no file"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = repr(error)
    if reason:
        raise UserError(f"{path} is not an index of safetensors files ({reason}). Copy the checkpoint again.")
    return dict(files)


def weight_file_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the safetensors files of a checkpoint, from their headers alone."""
    names = [SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(read_index(folder).values()))
        except UserError as error:
            yield str(error).rstrip(".")
            return
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield (
            f"the checkpoint {folder} lacks {missing[0]}{more}. Only safetensors are read: copy the whole "
            "checkpoint, or convert it with transformers' save_pretrained"
        )
    for name in names:
        if name not in missing:
            try:
                with safe_open(str(folder / name), framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                yield f"{folder / name} is not a complete safetensors file ({error}). Copy it again"


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What a safetensors file says of each tensor, and where the first one begins. UserError if it is no such file."""
    try:
        with safe_open(str(path), framework="numpy"):  # checks that the header is sound and the file is complete
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}). It was probably cut short; copy it again."
        ) from error
    header.pop("__metadata__", None)
    return header, 8 + length


def write_header(file: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
    """Write the beginning of a safetensors file: (type, shape, bytes) of each tensor, in the order that they follow.

    It lists names and places, so that a file can be written without holding its tensors.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape, nbytes) in tensors.items():
        start, end = end, end + nbytes
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
