"""Errors that a user can cause and correct, and the exit statuses of the `spell` command."""

import errno
from enum import IntEnum


class UserError(Exception):
    """Something that the user can correct; the message says what is wrong, where, and what to do.

    The command line prints the message without a stack trace and exits with `ExitStatus.USER_ERROR`.
    """


class ProcessLost(Exception):
    """Another process of the run has ended, and this one cannot go on without it; the message says which.

    The command line prints the message without a stack trace and exits with `ExitStatus.DEFECT`: what happened is the
    other one's to say, and a job may be started again.
    """


_PERMISSION = "this user has no permission. Correct the permissions, or choose another place"
_OPEN_FILES = "too many files are open. Raise the limit (ulimit -n)"
_EXPLANATIONS = {
    errno.ENOSPC: "the disk is full. Free some space, or choose another disk",
    errno.EDQUOT: "the disk quota is used up. Free some space, ask for a larger quota, or choose another disk",
    errno.EROFS: "the filesystem can only be read. Choose another place, or have it mounted for writing",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ESTALE: "the shared filesystem has lost the file (a stale handle). Another machine may have replaced it; try "
    "again, and if that does not help, have the filesystem mounted again",
    errno.EIO: "the disk or the shared filesystem reports an error (EIO). The system's log may say more",
    errno.EFBIG: "the file becomes larger than is allowed. Raise the limit (ulimit -f), or choose another filesystem",
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
}


def explain(error: OSError) -> str | None:
    """What is wrong with a disk, a filesystem or its permissions, and the remedy; None: the error is another one."""
    return _EXPLANATIONS.get(error.errno or 0)


class ExitStatus(IntEnum):
    """How a command of `spell` ends."""

    SUCCESS = 0
    DEFECT = 1
    """A defect of the program, of which Python prints a stack trace; or a `ProcessLost`."""
    USER_ERROR = 2
    """A `UserError`; of `spell plan`: the run does not fit its GPUs."""
    RUN_FAILED = 3
    """Of `spell status` and `spell stop`: the run failed, or gives no sign of life."""
    REQUEUE = 75
    """Of `spell train`: stopped on SIGUSR1, with a checkpoint if there was anything to save, to be started again."""
    INTERRUPTED = 130
    """By Ctrl-C; `spell train` saves a checkpoint first if there is anything to save."""
    CLOSED_PIPE = 141
    """Nobody reads the output any more (`spell train --help | head`); as of programs that SIGPIPE ends."""
    TERMINATED = 143
    """By SIGTERM; `spell train` saves a checkpoint first if there is anything to save."""
