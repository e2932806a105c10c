"""What is wrong with settings: one kind of fault for a run's settings, a cluster's file, preflight and layouts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spell_megatron.errors import UserError


@dataclass(frozen=True)
class Fault:
    """Something wrong with one setting, or with several that do not fit together. `str` gives one line."""

    keys: tuple[str, ...]
    """Dotted keys; the first one heads the line."""
    message: str
    """What is wrong, and the remedy; without a full stop at the end."""
    place: str = ""
    """Which of several files holds the setting."""

    @classmethod
    def of(cls, keys: str, message: str) -> Fault:
        """A fault of dotted keys that are separated by spaces."""
        return cls(tuple(keys.split()), message)

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        line = f"{self.keys[0]}{place}: {' '.join(self.message.split())}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def raise_faults(faults: Iterable[Fault], where: str) -> None:
    """Raise one UserError that lists all faults, one a line; do nothing if there are none."""
    lines = [f"  {fault}" for fault in faults]
    if lines:
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise UserError("\n".join([f"{count} in {where}:", *lines]))


def involves(fault: Fault, keys: Iterable[str]) -> bool:
    """Whether a fault is about one of these keys, a section that holds it, or a part of it."""
    return any(
        mine == other or mine.startswith(other + ".") or other.startswith(mine + ".")
        for mine in fault.keys
        for other in keys
    )
