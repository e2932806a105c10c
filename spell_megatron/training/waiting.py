"""Rows that wait until there are enough of them to keep every rank busy."""

from __future__ import annotations

from collections.abc import Sequence

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.prefix_tree import Row, pack

MICROBATCHES = 4
"""Microbatches of a call for each pipeline stage: a pipeline of p stages then idles less than a fifth of the time."""
LEAST = 1 / 16
"""Of a microbatch's tokens, for each of these: a call of fewer, such as the judgments of one answer, takes longer for
what every call takes than for its rows."""


class Waiting:
    """Collects the rows of an update for `Trainer.accumulate`.

    A call of few rows leaves pipelines and data-parallel ranks idle, or cuts prefixes to occupy them; a call of many is
    made late.

    Args:
        training: the settings of that name.
        ranks: data-parallel ranks.
    """

    def __init__(self, training: TrainingConfig, ranks: int) -> None:
        self._max_tokens = training.tokens_per_microbatch
        stages = training.parallel.pipeline
        self._trees = ranks * (MICROBATCHES * stages if stages > 1 else 1)
        self._rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> list[Row]:
        """Add a group of rows with a common prompt. Returns all rows that wait if they are enough, otherwise none."""
        self._rows += rows
        trees = pack(self._rows, self._max_tokens)
        enough = sum(len(tree.tokens) for tree in trees) >= LEAST * self._max_tokens * self._trees
        return self.take() if enough and len(trees) >= self._trees else []

    def take(self) -> list[Row]:
        """All rows that wait."""
        rows, self._rows = self._rows, []
        return rows
