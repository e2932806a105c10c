"""The files beside the weights that make a Hugging Face checkpoint usable: configuration, tokenizer, chat template.

They are read once and written to every checkpoint, which then needs the folder that they came from no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from spell_megatron.errors import UserError, explain

SideFiles = Mapping[str, bytes]
"""Contents by path in the checkpoint's folder."""

_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
_OF_WEIGHTS = ("*.index.json", "metadata.json", "weight_types.json")


def read_side_files(folder: Path) -> SideFiles:
    """The side files of a checkpoint. Folders and special files are none, whatever their name.

    Raises:
        UserError: one of them cannot be read, or is a link to nothing; the message names it.
    """
    paths = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
    own = [path for path in sorted(paths) if not any(path.match(pattern) for pattern in _OF_WEIGHTS)]
    return {str(path.relative_to(folder)): _read(path) for path in own if path.is_file() or not path.exists()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        dangles = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = f"it is a link to {path.readlink()}, which is missing" if dangles else explain(error) or error
        raise UserError(
            f"{path}, which goes into every checkpoint, cannot be read: {reason}. Copy the file again from where the "
            "model came from, or remove it if the model does not need it."
        ) from error


def write_side_files(files: SideFiles, folder: Path, dtype: torch.dtype) -> None:
    """Write side files beside plain weights, and note the weights' type in config.json."""
    for name, content in {**files, "config.json": _noted(files["config.json"], dtype)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _noted(content: bytes, dtype: torch.dtype) -> bytes:
    """A config.json that names the type; as it was if one with a language model within a larger one does already."""
    config, name = json.loads(content), str(dtype).removeprefix("torch.")
    text = config.get("text_config")
    places = [config] if text is None else [config, text]
    named = [place[key] for place in places for key in ("torch_dtype", "dtype") if place.get(key)]
    if text is not None and named and set(named) == {name}:
        return content
    config.pop("quantization_config", None)  # of the weights that these were made of
    for place in places:
        place.pop("torch_dtype", None)  # the older name of the same key
        place["dtype"] = name
    return (json.dumps(config, indent=2) + "\n").encode("utf-8")
