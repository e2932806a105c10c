"""Which clusters a step uses: the shortest prefix of the sampler's stream that holds N mixed groups.

Every cluster advances alone, without a barrier between roles. What the step uses does not depend on timing: its
clusters are a prefix of the stream, in the order of admission. Clusters beyond the prefix were speculation. They are
cancelled, and a later step plays them again.

A cluster that has ended is certain to be used as soon as fewer than N clusters before it are mixed or may still be.
Most are, long before the last one ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.selfplay.attempt import Attempt, Stage
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.outcomes import Outcome

# A step is given up when more than this share of its clusters (and at least this number) failed in our own code:
# one odd sample is counted and left out, a broken program is not.
MAX_ERROR_SHARE = 0.5
MIN_ERRORS = 20


class MixedRate:
    """Estimates how likely a cluster in a given stage ends as a mixed group.

    It learns from clusters in the order of admission: failures end early, and counting them as they come
    would make the rate look low for as long as the others are still running. Only the amount of
    speculation depends on it, never what the step uses.
    """

    def __init__(self) -> None:
        # The prior stands for a few clusters of which half get mixed; it soon stops mattering.
        self._ended: dict[Stage, float] = {"question": 5.0, "answers": 5.0}
        self._passed: dict[Stage, float] = {"question": 3.5, "answers": 3.5}

    def record(self, stage: Stage, passed: bool) -> None:
        """Count a stage that ended: a question that is put to the responder, answers that are mixed."""
        self._ended[stage] += 1
        self._passed[stage] += passed

    def __call__(self, stage: Stage) -> float:
        rate = self._passed["answers"] / self._ended["answers"]
        return rate if stage == "answers" else rate * self._passed["question"] / self._ended["question"]

    def forget(self, keep: float = 0.5) -> None:
        """Weigh what was seen so far by `keep`, so that the estimate follows the policy."""
        for counts in (self._ended, self._passed):
            for stage in counts:
                counts[stage] *= keep


class Stream:
    """The clusters of one step.

    Args:
        upcoming: clusters and their tasks, in the sampler's order.
        play: takes an attempt through all roles; it returns when the attempt has ended.
        wanted: N, the number of mixed groups.
        limit: most clusters to admit.
        rate: estimates how many of the running clusters will be mixed.

    Attributes:
        attempts: all admitted clusters.
    """

    def __init__(
        self,
        upcoming: Iterator[tuple[Cluster, str]],
        play: Callable[[Attempt], Coroutine[Any, Any, None]],
        wanted: int,
        limit: int,
        rate: MixedRate,
    ) -> None:
        self.attempts: list[Attempt] = []
        self._upcoming = upcoming
        self._play = play
        self._wanted = wanted
        self._limit = limit
        self._rate = rate
        self._running: dict[asyncio.Task[None], Attempt] = {}
        self._asked = 0  # length of the prefix whose questions have passed or failed
        self._used = 0  # length of the prefix that the step uses: ended, and with at most N mixed groups
        self._mixed = 0  # mixed groups in it

    async def run(self, on_progress: Callable[[], None]) -> list[Attempt]:
        """Play clusters until enough of them are mixed, or the limit is reached; the attempts to use.

        `on_progress` is called whenever some have ended.

        Raises:
            UserError: the engines failed for good, or most clusters end in an error.
        """
        try:
            while self._mixed < self._wanted:
                self._admit()
                if not self._running:
                    break
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del self._running[task]
                    task.result()  # engine failures and programming errors end the step
                self._advance()
                self._refuse_broken()
                on_progress()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        return self.attempts[: self._used]

    @property
    def mixed(self) -> int:
        """How many of the wanted groups there are."""
        return min(_mixed(self.attempts), self._wanted)

    def certain(self) -> list[Attempt]:
        """The attempts that have ended and that the step uses for sure."""
        found: list[Attempt] = []
        before = 0  # attempts before this one that are mixed, or may still be
        for attempt in self.attempts:
            if before == self._wanted:
                break
            if attempt.ended:
                found.append(attempt)
            before += attempt.mixed or not attempt.ended
        return found

    def possible(self) -> list[Attempt]:
        """All attempts that the step may use; none as long as it may use some that have not been admitted."""
        mixed = 0
        for attempt in self.attempts:
            mixed += attempt.mixed
            if mixed == self._wanted:
                return self.attempts[: attempt.index + 1]
        return []

    def _admit(self) -> None:
        """Start as many clusters as are expected to be needed."""
        expected = _mixed(self.attempts) + sum(self._rate(attempt.stage) for attempt in self._running.values())
        while expected < self._wanted and len(self.attempts) < self._limit:
            attempt = Attempt(len(self.attempts), *next(self._upcoming))
            self.attempts.append(attempt)
            self._running[asyncio.create_task(self._play(attempt))] = attempt
            expected += self._rate(attempt.stage)

    def _advance(self) -> None:
        """Lengthen the prefixes by what has ended, and let the estimate learn from it."""
        attempts = self.attempts
        while self._asked < len(attempts):
            attempt = attempts[self._asked]
            if not attempt.ended and attempt.stage == "question":
                break
            self._rate.record("question", attempt.stage == "answers")
            self._asked += 1
        while self._used < len(attempts) and attempts[self._used].ended and self._mixed < self._wanted:
            attempt = attempts[self._used]
            if attempt.stage == "answers":
                self._rate.record("answers", attempt.mixed)
            self._mixed += attempt.mixed
            self._used += 1

    def _refuse_broken(self) -> None:
        errors = sum(attempt.outcome is Outcome.ERROR for attempt in self.attempts)
        ended = sum(attempt.ended for attempt in self.attempts)
        if errors >= MIN_ERRORS and errors > MAX_ERROR_SHARE * ended:
            raise UserError(
                f"{errors} of {ended} clusters of this step failed with an internal error, so the step was "
                "given up. The log holds the stack trace of each; the first usually tells the cause."
            )


def _mixed(attempts: Sequence[Attempt]) -> int:
    return sum(attempt.mixed for attempt in attempts)
