"""What preflight found: faults, which end the run before it begins, and warnings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from spell_megatron.config.faults import Fault
from spell_megatron.errors import UserError

Result = TypeVar("Result")


@dataclass
class Findings:
    """Faults and warnings about a configuration on this machine."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def fault(self, keys: str, message: str) -> None:
        """Note a fault of dotted keys, separated by spaces."""
        self.faults.append(Fault.of(keys, message))

    def warn(self, message: str) -> None:
        """Note what may go wrong."""
        self.warnings.append(message)

    def attempt(self, keys: str, action: Callable[[], Result]) -> Result | None:
        """The result of an action; if it raises a UserError, that is a fault of `keys`."""
        try:
            return action()
        except UserError as error:
            self.fault(keys, str(error))
            return None
