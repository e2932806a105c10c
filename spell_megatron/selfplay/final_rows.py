"""Rows of the batch that are final before the last cluster of a step has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.selfplay.advantages import assign_advantages
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import Role, Sample
from spell_megatron.selfplay.judgments import JudgmentDraw


class FinalRows:
    """Gives away the rows of a step that are final, each once, with their advantages.

    Answers are final when their group is certain to be in the batch, judgments when they are certain to be drawn. The
    advantage of a question depends on all questions of the batch.

    Args:
        draw: of the step's judgments.
        untrained: roles that have no rows in the batch.
        on_final: gets rows of a group.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        draw: JudgmentDraw,
        untrained: Collection[Role],
        on_final: Callable[[list[Sample]], None],
    ) -> None:
        self._config, self._draw, self._untrained, self._on_final = config, draw, untrained, on_final
        self._given: set[int] = set()

    def look(self, used: Sequence[Attempt], possible: Sequence[Attempt]) -> None:
        """Give what has become final.

        Args:
            used: attempts that have ended and that the step uses for sure.
            possible: all attempts that it may use; none if it is not known yet.
        """
        if self._config.shuffle_rewards:
            return  # other rows decide about these advantages
        if "responder" not in self._untrained:
            self._give(attempt.answers for attempt in used if attempt.mixed)
        if "verifier" not in self._untrained:
            self._give(self._draw.certain(used, possible))

    def _give(self, groups: Iterable[list[Sample]]) -> None:
        for rows in groups:
            if rows[0] not in self:
                assign_advantages(rows, self._config.questioner.advantage_group)
                self._given.update(map(id, rows))
                self._on_final(rows)

    def __contains__(self, sample: Sample) -> bool:
        return id(sample) in self._given
