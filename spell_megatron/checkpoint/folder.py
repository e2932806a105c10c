"""The checkpoints in a run's folder: the newest, the best, and whether one is complete.

`<run>/checkpoints/step_000010/` holds

    trainer/       weights, optimizer and schedule (Megatron's torch_dist format, loads in any layout)
    hf/            the weights as a Hugging Face checkpoint
    state.json     what the caller gave: step, history, sampler, ...
    rng/           random states of each rank
    config.json    the configuration that the run had
    meta.json      step, optimizer steps, ranks, versions; its presence marks a complete checkpoint

and `<run>/checkpoints/latest` names the newest one. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.files import when_there, write_text


def latest(run_folder: Path) -> Path | None:
    """Folder of the newest checkpoint of a run; None if it has none. UserError if it is incomplete."""
    root = Path(run_folder) / "checkpoints"
    pointer = root / "latest"
    if not pointer.exists():
        return None
    folder = root / pointer.read_text(encoding="utf-8").strip()
    check_complete(folder)
    return folder


def best(run_folder: Path) -> dict[str, Any]:
    """Which checkpoint of a run did best on its held-out questions: {"checkpoint", "score"}; {} if none is known."""
    path = Path(run_folder) / "checkpoints" / "best.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note_score(run_folder: Path, step: int, score: float) -> None:
    """Rank 0: if the checkpoint of `step` did better than the best one, keep it instead of that one."""
    root = Path(run_folder) / "checkpoints"
    if score > best(run_folder).get("score", -math.inf):
        record = {"checkpoint": f"step_{step:06d}", "score": score}
        write_text(root / "best.json", json.dumps(record), sync=True)


def wait_until_seen(path: Path) -> None:
    """Wait until this node sees what rank 0 has on the filesystem that all nodes share.

    Raises:
        UserError: it does not see it.
    """
    try:
        when_there(path, lambda path: path.exists() or None)
    except TimeoutError as error:
        raise UserError(
            f"The node {socket.gethostname()} does not see {path}, which is there on the node of rank 0. "
            "run.output_dir must be on a filesystem that all nodes of the job share."
        ) from error


def check_complete(folder: Path) -> None:
    if (folder / "meta.json").exists():
        return
    others = sorted(path.parent.name for path in folder.parent.glob("step_*/meta.json"))
    remedy = "There is no complete one beside it; start the run again without --resume."
    if others:
        pointer = folder.parent / "latest"
        remedy = f"Complete ones are {', '.join(others)}: write one of these names into {pointer}."
    fault = "is incomplete" if folder.exists() else "does not exist"
    raise UserError(f"The checkpoint {folder} {fault}. {remedy}")
