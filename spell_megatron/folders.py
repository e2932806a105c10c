"""What lies below a folder: links are followed, and what systems and editors leave behind is not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A folder below another, or that other itself."""

    path: Path
    subfolders: list[str]
    """Names of the folders in it, also of those that are links."""
    files: list[str]
    """Names of all else in it."""


def is_left_behind(path: str) -> bool:
    """Whether a path inside a folder or archive is hidden or no one's work.

    Such are `._x` and `__MACOSX` of macOS, `.git`, `.cache`, `x~` of editors, `~$x` of office programs, and Thumbs.db.
    """
    names = [part for part in Path(path).parts if part != ".."]
    return any(
        name.startswith((".", "~$")) or name.endswith("~") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")
        for name in names
    )


def walk(root: Path, left_out: Callable[[str, Path, str], None] = lambda kind, path, why: None) -> Iterator[Folder]:
    """A folder and all below it, each once, in a fixed order; what is `is_left_behind` is left out.

    Links to folders are followed after all else has been walked, so that a folder that is also reached by a link keeps
    its own name.

    Args:
        left_out: is told of folders that cannot be read, and of links to a folder that holds `root`: (kind, path, why).
    """

    def unreadable(error: OSError) -> None:
        left_out("unreadable folders", Path(error.filename), error.strerror or "cannot be read")

    around = {_identity(folder) for folder in root.resolve().parents}
    waiting, seen = [root], set()
    while waiting:
        start, links = waiting.pop(0), []
        for where, folders, names in os.walk(start, onerror=unreadable):
            path, key = Path(where), _identity(Path(where))
            if key in seen:
                folders.clear()
                continue
            seen.add(key)
            folders[:] = sorted(name for name in folders if not is_left_behind(name))
            yield Folder(path, list(folders), sorted(name for name in names if not is_left_behind(name)))
            links += [path / name for name in folders if os.path.islink(path / name)]
        for link in links:
            if _identity(link) in around:
                left_out("links to a folder that holds the input", link, "is not followed, because it holds the input")
            else:
                waiting.append(link)


def _identity(folder: Path) -> tuple[int, int] | Path:
    try:
        status = folder.stat()
    except OSError:  # it has gone, or is too deep
        return folder
    return status.st_dev, status.st_ino
