"""Errors that a user can cause and mend."""


class UserError(Exception):
    """Something the user can put right; the message says what is wrong, where, and what to do.

    The command line prints the message without a stack trace and exits with status 2.
    """
