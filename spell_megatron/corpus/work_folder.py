"""Results of finished stages, so that a run that was stopped continues from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spell_megatron.errors import UserError, explain
from spell_megatron.files import write_text
from spell_megatron.monitoring.progress import Progress
from spell_megatron.processes.folder_lock import FolderLock


class WorkFolder:
    """The hidden folder beside the output that holds the results of finished stages."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self.finished = False

    @classmethod
    @contextmanager
    def open(cls, out: Path, fingerprint: str, progress: Progress) -> Iterator[WorkFolder]:
        """The folder for this output, emptied if its inputs or options were others.

        It is removed when the work is finished, and after a failure in the first stage, when there is nothing to keep.

        Raises:
            UserError: another process is at work on this output, or the folder cannot be written.
        """
        self = cls(out.with_name(f".{out.name}.work"), progress)
        try:
            remedy = "Wait for it, or stop it."
            with FolderLock(out.parent, f"`spell prepare --out {out.name}`", remedy, f".{out.name}.lock"):
                self._folder.mkdir(parents=True, exist_ok=True)
                try:
                    self._clear_unless(fingerprint)
                    yield self
                finally:
                    if self.finished or not self._done():
                        shutil.rmtree(self._folder)
        except OSError as error:
            reason = explain(error) or error.strerror or error
            raise UserError(
                f"Cannot write {out}: {error.filename or self._folder}: {reason}. Run the same command again, or name "
                "another --out; what is finished is not repeated."
            ) from error

    def _done(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.is_dir() and path.suffix != ".partial"]

    def _clear_unless(self, fingerprint: str) -> None:
        key = self._folder / "fingerprint"
        if key.exists() and key.read_text() == fingerprint:
            return
        if self._done():
            self._progress.line("inputs or options have changed since the run that was stopped: starting over")
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        write_text(key, fingerprint)

    def stage(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder with a stage's result; `make` fills it unless an earlier run has.

        What a killed run has left of an unfinished stage is still there when `make` is called.
        """
        folder = self._folder / name.replace(" ", "-")
        if folder.is_dir():
            self._progress.line(f"{name}: finished before")
            return folder
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(exist_ok=True)
        make(partial)
        partial.rename(folder)
        return folder
