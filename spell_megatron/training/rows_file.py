"""Rows of an update in a file of plain arrays (safetensors). Rows with a common prompt share it there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from spell_megatron.files import appearing_file
from spell_megatron.training.prefix_tree import Row

FORMAT = "1"
"""Of the file, under this key of its metadata."""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a file that appears when it is complete and on the disk."""
    numbers: dict[bytes, int] = {}
    prompts: list[np.ndarray] = []
    of_row = []
    for row in rows:
        prompt = row.tokens[: row.prompt_length].astype(np.int32)
        number = numbers.setdefault(prompt.tobytes(), len(prompts))
        if number == len(prompts):
            prompts.append(prompt)
        of_row.append(number)
    arrays = {"prompt_of_row": np.asarray(of_row, np.int64)}
    arrays |= _joined("prompts", prompts, np.int32)
    arrays |= _joined("responses", [row.tokens[row.prompt_length :] for row in rows], np.int32)
    for name in ("weights", "rollout_logprobs"):
        arrays[name] = np.concatenate([np.empty(0, np.float32), *(getattr(row, name) for row in rows)])
    arrays["routed"] = np.asarray([row.routing is not None for row in rows], np.uint8)
    if routings := [row.routing for row in rows if row.routing is not None]:
        arrays |= _joined("routings", routings, routings[0].dtype)
    with appearing_file(path) as partial:
        save_file(arrays, partial, {"format": FORMAT})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of `write_rows`.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: there is no such file, or it holds something else.
    """
    with safe_open(path, "np") as file:
        if (found := (file.metadata() or {}).get("format")) != FORMAT:
            raise ValueError(f"its format is {found}, and this version of spell_megatron reads format {FORMAT}")
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    prompts, responses = _cut("prompts", arrays), _cut("responses", arrays)
    bounds = np.cumsum([0, *map(len, responses)])
    routings = iter(_cut("routings", arrays) if arrays["routed"].any() else [])
    rows = []
    parts = zip(arrays["prompt_of_row"], responses, pairwise(bounds), arrays["routed"], strict=True)
    for prompt, response, (start, stop), routed in parts:
        rows.append(
            Row(
                tokens=np.concatenate([prompts[prompt], response], dtype=np.int64),
                prompt_length=len(prompts[prompt]),
                weights=arrays["weights"][start:stop],
                rollout_logprobs=arrays["rollout_logprobs"][start:stop],
                routing=next(routings) if routed else None,
            )
        )
    return rows


def _joined(name: str, parts: Sequence[np.ndarray], kind: type | np.dtype) -> dict[str, np.ndarray]:
    """Arrays as one, and their lengths."""
    lengths = np.asarray([len(part) for part in parts], np.int64)
    return {name: np.concatenate(parts, dtype=kind) if parts else np.empty(0, kind), f"{name}_lengths": lengths}


def _cut(name: str, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays that were joined under a name."""
    bounds = np.cumsum([0, *arrays[f"{name}_lengths"]])
    return [arrays[name][start:stop] for start, stop in pairwise(bounds)]
