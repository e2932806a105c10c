"""A shared filesystem that shows late what other machines have written; for tests. It is a program of its own, for a
Python that has fuse-python: `late_folder.py BACKING MOUNT_POINT SECONDS`.

A machine sees at once what it writes itself. It sees what another has made only after some seconds, and what it has
seen once it goes on to see. To make a file exclusively, to make a folder and to rename are the server's to decide, at
once. Hard links are not supported. That is the promise of a networked filesystem, and no more.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_PYTHON = "/usr/bin/python3"
_UTIME_NOW = 2**30 - 1


def missing() -> str:
    """Why there can be no such filesystem here; "" if there can be."""
    if not os.access("/dev/fuse", os.W_OK):
        return "/dev/fuse cannot be opened"
    if shutil.which(_PYTHON) is None or subprocess.run([_PYTHON, "-c", "import fuse"], capture_output=True).returncode:
        return f"{_PYTHON} has no fuse-python (Debian: apt-get install python3-fuse)"
    return ""


def mount(enter: list[str], backing: Path, place: Path, seconds: float) -> None:
    """Mount it on a machine; it ends with the machine. `enter`: words before a command that is to run there."""
    done = subprocess.run([*enter, _PYTHON, __file__, backing, place, str(seconds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _serve(backing: str, place: str, seconds: float) -> None:
    import fuse

    fuse.fuse_python_api = (0, 2)
    seen: set[str] = set()
    asked: dict[str, float] = {}  # when a file that was not seen had last changed, when it was asked for first

    def real(path: str) -> str:
        return backing + path

    def check(path: str) -> str:
        """The real path of what this machine sees."""
        for part in (path[:end] for end in [*(i for i, letter in enumerate(path) if letter == "/" and i), len(path)]):
            if not visible(part):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(path)

    def visible(path: str) -> bool:
        if path == "/" or path in seen:
            if not os.path.lexists(real(path)):
                seen.discard(path)
            return True
        try:
            changed = min(os.lstat(place).st_ctime for place in (real(path), *inside(real(path))))
        except OSError:
            asked.pop(path, None)
            return False
        # One that goes on to change becomes visible too.
        if time.time() - min(changed, asked.setdefault(path, changed)) > seconds:
            seen.add(path)
            return True
        return False

    def inside(place: str) -> list[str]:
        """What a folder has: the folder itself changes with each of them."""
        return [os.path.join(place, name) for name in os.listdir(place)] if os.path.isdir(place) else []

    class File:
        def __init__(self, path: str, flags: int, *mode: int) -> None:
            if mode:  # made here
                self.descriptor = os.open(real(path), flags | os.O_CREAT, mode[0])
                seen.add(path)
            else:
                self.descriptor = os.open(check(path), flags & ~os.O_APPEND)
            self.keep = False
            self.direct_io = False

        def read(self, length: int, offset: int) -> bytes:
            return os.pread(self.descriptor, length, offset)

        def write(self, content: bytes, offset: int) -> int:
            return os.pwrite(self.descriptor, content, offset)

        def release(self, flags: int) -> None:
            os.close(self.descriptor)

        def fsync(self, only_data: int) -> None:
            os.fsync(self.descriptor)

        def fgetattr(self) -> os.stat_result:
            return os.fstat(self.descriptor)

        def ftruncate(self, length: int) -> None:
            os.ftruncate(self.descriptor, length)

    class Late(fuse.Fuse):
        file_class = File

        def getattr(self, path: str) -> os.stat_result:
            return os.lstat(check(path))

        def access(self, path: str, mode: int) -> int | None:
            return None if os.access(check(path), mode) else -errno.EACCES

        def readdir(self, path: str, offset: int):
            for name in [".", "..", *os.listdir(check(path))]:
                if (name[0] == "." and name in (".", "..")) or visible(f"{path.rstrip('/')}/{name}"):
                    yield fuse.Direntry(name)

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(real(path), mode)
            seen.add(path)

        def unlink(self, path: str) -> None:
            os.unlink(check(path))

        def rmdir(self, path: str) -> None:
            os.rmdir(check(path))

        def rename(self, before: str, after: str) -> None:
            os.rename(check(before), real(after))
            seen.update({after, *(after + path[len(before) :] for path in seen if path.startswith(before + "/"))})

        def link(self, target: str, path: str) -> int:
            return -errno.EPERM

        def symlink(self, target: str, path: str) -> None:
            os.symlink(target, real(path))
            seen.add(path)

        def readlink(self, path: str) -> str:
            return os.readlink(check(path))

        def chmod(self, path: str, mode: int) -> None:
            os.chmod(check(path), mode)

        def chown(self, path: str, user: int, group: int) -> None:
            os.chown(check(path), user, group)

        def truncate(self, path: str, length: int) -> None:
            os.truncate(check(path), length)

        def utimens(self, path: str, access, change) -> None:
            if change.tv_nsec == _UTIME_NOW:
                os.utime(check(path))
            else:
                os.utime(check(path), (access.tv_sec + access.tv_nsec / 1e9, change.tv_sec + change.tv_nsec / 1e9))

        def statfs(self) -> os.statvfs_result:
            return os.statvfs(backing)

    server = Late()
    server.parse([place, "-o", "attr_timeout=0,entry_timeout=0,negative_timeout=0,allow_other"])
    server.multithreaded = False
    server.main()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
