"""Which groups of judgments a step trains on: those whose priorities are the lowest.

A priority is derived from seed and place as if it were drawn, so each group has the same chance. No priority depends on
another group, so some groups are known to be in the batch before all answers have been judged.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import Sample, judgment_groups
from spell_megatron.selfplay.seeds import derive_seed

Judgments = list[Sample]
"""Those of one answer."""
Place = tuple[int, int]
"""Of an attempt among those of the step, and of one of its answers."""


class JudgmentDraw:
    """The draw of one step.

    Args:
        seed: of the run.
    """

    def __init__(self, config: SelfPlayConfig, seed: int, step: int) -> None:
        self._config, self._seed, self._step = config, seed, step

    def in_order(self, attempts: Sequence[Attempt]) -> list[Judgments]:
        """All judgments that may be trained on, those to be taken first at the beginning."""
        found = {place: rows for attempt in attempts for place, rows in _trainable(attempt).items()}
        return [found[place] for place in sorted(found, key=self._priority)]

    def certain(self, used: Sequence[Attempt], possible: Sequence[Attempt]) -> list[Judgments]:
        """Those that the step trains on whatever becomes of the attempts that have not ended.

        Args:
            used: attempts that have ended and that the step uses for sure.
            possible: all attempts that it may use; none if it is not known yet.
        """
        answers = sum(attempt.mixed for attempt in possible) * self._config.group_size
        rivals = [place for attempt in possible for place in self._places(attempt)]
        first = set(heapq.nsmallest(judgment_groups(answers, self._config), rivals, key=self._priority))
        return [rows for attempt in used for place, rows in _trainable(attempt).items() if place in first]

    def _priority(self, place: Place) -> tuple[int, Place]:
        attempt, answer = place
        return derive_seed(self._seed, self._step, attempt, "judgments", answer), place

    def _places(self, attempt: Attempt) -> Iterable[Place]:
        """Where there are judgments that may be trained on, or may still be."""
        if attempt.ended:
            return _trainable(attempt)
        return [(attempt.index, answer) for answer in range(self._config.group_size)]


def _trainable(attempt: Attempt) -> dict[Place, Judgments]:
    if not (attempt.outcome and attempt.outcome.answered):
        return {}
    return {(attempt.index, answer): rows for answer, rows in attempt.trainable_judgments.items()}
