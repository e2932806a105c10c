"""What layers work out from the shape of a row of prefix trees, once for all layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Options = TypeVar("Options")
Prepared = TypeVar("Prepared")


class RowMemo(Generic[Options, Prepared]):
    """Remembers what was made of the last rows, forward and recomputed.

    Recompute hands a detached alias of `end` over, so rows are told apart by their memory; holding the tensor keeps
    that memory from being used again.
    """

    def __init__(self, make: Callable[[Tensor, Options], Prepared]) -> None:
        """make: of `end` [tokens], the end of each token's subtree, and options."""
        self._make = make
        self._known: deque[tuple[Tensor, Options, Prepared]] = deque(maxlen=4)

    def of(self, end: Tensor, options: Options) -> Prepared:
        """What `make` makes of them. `end` must not be changed in place afterwards."""
        for known, asked, prepared in self._known:
            same_memory = known.data_ptr() == end.data_ptr() and known.device == end.device
            if same_memory and known.shape == end.shape and asked == options:
                return prepared
        prepared = self._make(end, options)
        self._known.append((end, options, prepared))
        return prepared
