"""Whether the safetensors files of a Hugging Face checkpoint are complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open


def weight_file_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the safetensors files of a checkpoint, from their headers alone."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{index} is not an index of safetensors files ({error!r}). Copy the checkpoint again"
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
