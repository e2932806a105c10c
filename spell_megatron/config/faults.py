"""What is wrong with settings: one kind of fault for a run's settings, a cluster's file and the preflight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spell_megatron.errors import UserError


@dataclass(frozen=True)
class Fault:
    """Something wrong with one setting, or with several that do not fit together. `str` gives one line."""

    keys: tuple[str, ...]
    """Dotted keys; the first one heads the line."""
    message: str
    """What is wrong, and the remedy."""
    place: str = ""
    """Which of several files holds the setting."""

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        line = f"{self.keys[0]}{place}: {' '.join(self.message.split())}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def raise_faults(faults: Sequence[Fault], where: str) -> None:
    """Raise one UserError that lists all faults, one a line; do nothing if there are none."""
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError("\n".join([f"{count} in {where}:", *(f"  {fault}" for fault in faults)]))


def involves(fault: Fault, keys: Iterable[str]) -> bool:
    """Whether a fault is about one of these keys, a section that holds it, or a part of it."""
    return any(
        mine == other or mine.startswith(other + ".") or other.startswith(mine + ".")
        for mine in fault.keys
        for other in keys
    )
