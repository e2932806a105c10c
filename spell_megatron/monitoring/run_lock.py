"""One process at a time in a run's folder."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from spell_megatron.monitoring import status
from spell_megatron.processes.folder_lock import FolderLock, in_use, lives, newest, read_holder
from spell_megatron.ranks import slurm_job


def run_lock(folder: Path) -> FolderLock:
    """Keeps the folder of a run for this process."""
    return FolderLock(folder, "`spell train`", _remedy(folder))


def in_use_by_another(folder: Path) -> str:
    """For users, which process works in a run's folder, and what to do; "" if none does.

    In a Slurm job it does not look: `run_lock` does, and waits if it has to.
    """
    if slurm_job() is not None:
        return ""
    if number := newest(folder):
        path = folder / f"lock-{number}"
        holder = read_holder(path)
        return in_use(folder, holder, _remedy(folder)) if lives(path, holder) else ""
    return _by_status(folder)


def _by_status(folder: Path) -> str:
    """`in_use_by_another` for a run of an earlier version, which has a status and no lock."""
    path, said = folder / "status.json", {}
    with suppress(OSError, ValueError):
        said = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(said, dict) or not isinstance(said.get("time"), (int, float)) or status.ended(said):
        return ""
    holder = status.holder(said)
    # The age that it names itself may come from a clock that is wrong, or the file from a copy of the folder.
    doubtful = time.time() - said["time"] > status.SILENT_AFTER
    return in_use(folder, holder, _remedy(folder)) if lives(path, holder, doubtful=doubtful) else ""


def _remedy(folder: Path) -> str:
    return (
        f"Stop it with `spell stop {folder}` and wait until it has ended, or choose another name with --run.name=…. If "
        "it died with its machine, try again in a minute"
    )
