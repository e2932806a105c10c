"""The log of a trainer process: `logs/train.log` in the run's folder, of other ranks `logs/train-<rank>.log`.

What a run prints is in it with times, and what libraries say of themselves, which is not printed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from spell_megatron.errors import UserError

Level = Literal["debug", "info", "warning", "error"]

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PACKAGE = "spell_megatron"
_OWN_HANDLERS = ("transformers", "megatron", "torch", "vllm")
"""Libraries whose loggers may have handlers of their own."""


def log_file(folder: Path, rank: int) -> Path:
    """The log of a process in a run's folder."""
    return folder / "logs" / (f"train-{rank}.log" if rank else "train.log")


@contextmanager
def run_log(folder: Path, rank: int, level: Level) -> Iterator[None]:
    """Log what this process says, its libraries' warnings, and how it ends.

    Args:
        folder: the run's.
        level: least level of our own messages. Those of libraries must be warnings, or infos if this is debug.
    """
    path = log_file(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _File(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FORMAT))
    ours = logging.getLogger(_PACKAGE)
    shown = logging.StreamHandler(sys.stderr)  # an error of ours is told on the screen too, without its stack trace
    shown.setFormatter(_Short())
    shown.setLevel(logging.ERROR)
    shown.addFilter(lambda record: not getattr(record, "silent", False))
    ours.addHandler(shown)
    try:
        with logged_by(handler, level):
            try:
                yield
            except UserError as error:
                ours.error("%s", error, extra=SILENT)
                raise
            except Exception:
                ours.exception("the run failed", extra=SILENT)
                raise
    finally:
        ours.removeHandler(shown)
        handler.close()


SILENT = {"silent": True}
"""Of a message that is shown on the screen by itself."""


@contextmanager
def logged_by(handler: logging.Handler, level: Level) -> Iterator[None]:
    """Give a handler what this process and its libraries say; warnings too, which are then not on the screen.

    Args:
        level: of `run_log`.
    """
    root, ours = logging.getLogger(), logging.getLogger(_PACKAGE)
    before = root.level, ours.level
    root.addHandler(handler)
    ours.setLevel(level.upper())
    root.setLevel({"debug": logging.INFO, "info": logging.WARNING}.get(level, level.upper()))
    try:
        with warnings.catch_warnings(), _propagating():
            warnings.simplefilter("default")
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])


class _File(logging.FileHandler):
    """On a full disk what is logged is lost, or written later; a run that ends for it says why by itself."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (a name of logging)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Short(logging.Formatter):
    """Without stack traces."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.name}: {record.getMessage()} (logs/train.log has more)"


@contextmanager
def _propagating() -> Iterator[None]:
    """Have the libraries' loggers pass on what they say, instead of writing it to the screen."""
    changed = []
    for name in _OWN_HANDLERS:
        logger = logging.getLogger(name)
        changed.append((logger, list(logger.handlers), logger.propagate))
        logger.handlers, logger.propagate = [], True
    try:
        yield
    finally:
        for logger, handlers, propagate in changed:
            logger.handlers, logger.propagate = handlers, propagate
