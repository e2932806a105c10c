"""A new run that begins with a kept step of another run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from spell_megatron.checkpoint.folder import check_complete
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
    """Make `run` a run whose newest checkpoint is this one of another run, with the metrics up to it.

    Files are linked where that is possible, so that no second copy of the weights is made. The checkpoint may be
    deleted in one of the two runs; it then stays in the other one.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    new = run / "checkpoints" / checkpoint.name
    with appearing_folder(new) as partial:
        shutil.copytree(checkpoint, partial, copy_function=_link, dirs_exist_ok=True)
    metrics = checkpoint.parents[1] / "metrics.jsonl"
    try:
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
