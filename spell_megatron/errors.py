"""Errors that a user can cause and correct, and the exit statuses of the `spell` command."""

from enum import IntEnum


class UserError(Exception):
    """Something that the user can correct; the message says what is wrong, where, and what to do.

    The command line prints the message without a stack trace and exits with `ExitStatus.USER_ERROR`.
    """


class ExitStatus(IntEnum):
    """How a command of `spell` ends."""

    SUCCESS = 0
    DEFECT = 1
    """A defect of the program. Python prints a stack trace."""
    USER_ERROR = 2
    """A `UserError`; of `spell plan`: the run does not fit its GPUs."""
    RUN_FAILED = 3
    """Of `spell status` and `spell stop`: the run failed, or gives no sign of life."""
    REQUEUE = 75
    """Of `spell train`: stopped with a checkpoint on SIGUSR1, to be started again."""
    INTERRUPTED = 130
    """By Ctrl-C."""
    CLOSED_PIPE = 141
    """Nobody reads the output any more (`spell train --help | head`); as of programs that SIGPIPE ends."""
    TERMINATED = 143
    """By SIGTERM; `spell train` saves a checkpoint first if there is anything to save."""
