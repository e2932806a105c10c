"""What may happen in a step, but not in many one after the other."""

from __future__ import annotations

from spell_megatron.errors import UserError


class InARow:
    """Counts the consecutive steps in which something happened, and ends the run when they are too many."""

    LIMIT = 5

    def __init__(self, message: str) -> None:
        """message: of the error, a format with {count} and what `note` is given."""
        self._message, self._count = message, 0

    def note(self, happened: bool, **details: object) -> None:
        """Count a step in which it happened; any other step sets the count back to 0.

        Raises:
            UserError: it has happened in `LIMIT` steps in a row.
        """
        self._count = self._count + 1 if happened else 0
        if self._count >= self.LIMIT:
            raise UserError(self._message.format(count=self._count, **details))
