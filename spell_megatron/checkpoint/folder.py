"""The checkpoints in a run's folder: the newest, the best, and whether one is complete.

`<run>/checkpoints/step_000010/` holds

    trainer/       weights, optimizer and schedule (Megatron's torch_dist format, loads in any layout)
    hf/            the weights as a Hugging Face checkpoint
    state.json     what the caller gave: step, history, sampler, ...
    rows.safetensors   of the next update, if the engines have written them already
    rng/           random states of each rank
    config.json    the configuration that the run had
    meta.json      step, optimizer steps, ranks, versions; its presence marks a complete checkpoint

and `<run>/checkpoints/latest` names the newest one. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import math
import shlex
import socket
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.files import when_there, write_text

ROWS = "rows.safetensors"
"""File of a checkpoint with the rows of the next update; meta.json says how many there are."""


def latest(run_folder: Path) -> Path | None:
    """Folder of the newest checkpoint of a run; None if it has none. UserError if it is incomplete."""
    root = Path(run_folder) / "checkpoints"
    pointer = root / "latest"
    if not pointer.exists():
        return None
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{pointer} cannot be read: {error}. {go_on_without(root / 'none')}.") from error
    if not name.startswith("step_") or "/" in name:
        raise UserError(f"{pointer} does not hold the name of a checkpoint. {go_on_without(root / 'none')}.")
    check_complete(root / name)
    return root / name


def best(run_folder: Path) -> dict[str, Any]:
    """Which checkpoint of a run did best on its held-out questions: {"checkpoint", "score"}; {} if none is known.

    Raises:
        UserError: the file that says so is damaged.
    """
    path = Path(run_folder) / "checkpoints" / "best.json"
    if not path.exists():
        return {}
    record = read_object(
        path, "Write {} into it: the best checkpoint so far then counts as any other and may be deleted"
    )
    if record and not (isinstance(record.get("checkpoint"), str) and isinstance(record.get("score"), float | int)):
        raise UserError(f"{path} does not name a checkpoint and its score. Write {{}} into it.")
    return record


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


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds; UserError, which ends with the remedy, if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {remedy}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. {remedy}.")
    return content


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json of a checkpoint says: step, updates, ranks, versions. UserError if it is damaged."""
    check_complete(folder)
    meta = read_object(folder / "meta.json", go_on_without(folder))
    if lacking := [name for name in ("step", "updates", "ranks") if not isinstance(meta.get(name), int)]:
        raise UserError(f"{folder / 'meta.json'} is damaged: it lacks {lacking[0]}. {go_on_without(folder)}.")
    return meta


def read_state(folder: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint. UserError if the file is damaged."""
    return read_object(folder / "state.json", go_on_without(folder))


def check_complete(folder: Path) -> None:
    """UserError if a checkpoint is not there, or was not written to its end."""
    if not (folder / "meta.json").exists():
        fault = "is incomplete: it lacks meta.json" if folder.exists() else "does not exist"
        raise UserError(f"The checkpoint {folder} {fault}. {go_on_without(folder)}.")


def go_on_without(folder: Path) -> str:
    """What to do if a checkpoint cannot be used, and what that loses."""
    others = sorted(path.parent.name for path in folder.parent.glob("step_*/meta.json") if path.parent != folder)
    others = [name for name in others if name.removeprefix("step_").isdecimal()]  # not what a save left halfway
    if others:
        name, pointer = others[-1], shlex.quote(str(folder.parent / "latest"))
        return (
            f"To resume from {name}, which loses the updates after it, run `echo {name} > {pointer}` and resume again. "
            f"Complete ones are {', '.join(others)}"
        )
    weights = folder / "hf"
    if not (weights / "config.json").is_file():
        return "The run has no other complete checkpoint. Start a new one, under another run.name"
    return (
        "The run has no other complete checkpoint. A new run, under another run.name, can begin with the weights of "
        f"this one (--model.path={shlex.quote(str(weights))}), without its optimizer's state and history of questions"
    )
