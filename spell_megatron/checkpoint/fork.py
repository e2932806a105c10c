"""A new run that begins with a kept step of another run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from spell_megatron.checkpoint.folder import check_complete, read_state
from spell_megatron.errors import UserError, explain
from spell_megatron.files import appearing_folder, write_text


def kept_step(run: Path, step: int) -> Path:
    """The folder of a complete checkpoint of a run; UserError, which names those that there are, if it has none."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    names = (path.parent.name.removeprefix("step_") for path in folder.parent.glob("step_*/meta.json"))
    if steps := sorted(int(name) for name in names if name.isdecimal()):
        if step not in steps:
            raise UserError(f"{run} has no checkpoint of step {step}. It has kept {', '.join(map(str, steps))}.")
        check_complete(folder)
        return folder
    raise UserError(f"{run} has no checkpoint to begin with.")


def fork(checkpoint: Path, run: Path) -> None:
    """Make `run` a run whose newest checkpoint is this one of another run, with the metrics up to it, and the dump of
    the next batch if the checkpoint holds that.

    Files are linked where that is possible, so that no second copy of the weights is made. The checkpoint may be
    deleted in one of the two runs; it then stays in the other one.

    Raises:
        UserError: the disk is full or the place cannot be written to; or the checkpoint is damaged.
    """
    old, new = checkpoint.parents[1], run / "checkpoints" / checkpoint.name
    ready = read_state(checkpoint).get("ready")
    with appearing_folder(new) as partial:
        shutil.copytree(checkpoint, partial, copy_function=_link, dirs_exist_ok=True)
    metrics = old / "metrics.jsonl"
    try:
        if ready:
            (run / "rollouts").mkdir(exist_ok=True)
            for dump in (old / "rollouts").glob(f"step_{ready['step']:06d}.*"):
                _link(str(dump), str(run / "rollouts" / dump.name))
        if metrics.is_file():
            shutil.copyfile(metrics, run / metrics.name)  # what comes after the step is removed at the resume
        write_text(new.parent / "latest", new.name, sync=True)
    except OSError as error:
        raise UserError(f"{run} could not be written: {explain(error) or error}.") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another filesystem, or on one that has no links
        shutil.copy2(source, target)
