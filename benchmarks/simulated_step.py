"""When groups become certain in a step of a planned run: for benchmarks/overlap.py.

The clusters of a step are played by the real `selfplay.stream` against simulated engines, in simulated time. Each
engine decodes as `spell plan` assumes: a token of all its sequences takes the time to read the weights and their
caches, and a prompt's prefill holds up all of them. What was begun first is served first. Lengths of responses are
drawn from a log-normal distribution, cut off at the limit, whose mean is the planner's; a cluster is mixed with the
planner's probability. Nothing depends on the machine.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from spell_megatron.planner.plan import Plan
from spell_megatron.planner.times import assumed_lengths
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.seeds import derive_seed
from spell_megatron.selfplay.stream import MixedRate, Stream
from spell_megatron.training.prefix_tree import Cost

SPREAD = 0.6
"""Standard deviation of the logarithms of the lengths."""


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next event."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

        def select(timeout: float | None) -> list:
            assert timeout is not None, "nothing will ever happen"
            self._now += timeout
            return []

        self._selector.select = select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


@dataclass(eq=False)
class Response:
    """A response on its way. cache, read: tokens of cache that it occupies, and that each of its tokens reads."""

    attempt: int
    tokens: float
    cache: float
    read: float
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Engine:
    """Decodes all its sequences at the same pace; further ones wait for room, those of early attempts least."""

    def __init__(self, plan: Plan) -> None:
        self._engine, self._most = plan.engine, plan.config.rollout.concurrency
        self._bandwidth = plan.gpu.bandwidth * plan.assume.memory_efficiency
        self._prefill = 0.0
        self._queue: list[tuple[int, int, Response]] = []
        self._arrivals = itertools.count()
        self._active: list[Response] = []
        self._changed = asyncio.Event()

    async def generate(self, sequences: Sequence[Response], prefill: float) -> None:
        """Seconds of `prefill` hold up everything."""
        self._prefill += prefill
        for sequence in sequences:
            heapq.heappush(self._queue, (sequence.attempt, next(self._arrivals), sequence))
        self._changed.set()
        for sequence in sequences:
            await sequence.done.wait()

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            self._admit()
            if self._prefill:
                seconds, self._prefill = self._prefill, 0.0
                await asyncio.sleep(seconds)
                continue
            self._changed.clear()
            if not self._active:
                await self._changed.wait()
                continue
            read = sum(sequence.read for sequence in self._active)
            pace = (self._engine.weights + self._engine.kv_per_token * read) / self._bandwidth
            began, least = clock(), min(sequence.tokens for sequence in self._active)
            try:
                async with asyncio.timeout(least * pace):
                    await self._changed.wait()
                made = (clock() - began) / pace
            except TimeoutError:
                made = least
            for sequence in self._active:
                sequence.tokens -= made
                if sequence.tokens < 1e-6:
                    sequence.done.set()
            self._active = [sequence for sequence in self._active if not sequence.done.is_set()]

    def _admit(self) -> None:
        room = self._engine.kv_cache / self._engine.kv_per_token - sum(sequence.cache for sequence in self._active)
        while self._queue and len(self._active) < self._most and self._queue[0][-1].cache <= room:
            *_, sequence = heapq.heappop(self._queue)
            room -= sequence.cache
            self._active.append(sequence)


class Clusters:
    """Plays clusters as `selfplay.roles` does, with a gate, on simulated engines."""

    def __init__(self, plan: Plan, cost: Cost, seed: int) -> None:
        self._plan, self._cost, self._seed = plan, cost, seed
        self._lengths = assumed_lengths(plan.config, plan.assume)
        self.engines = [Engine(plan) for _ in range(plan.config.rollout.replicas)]

    async def play(self, attempt: Attempt) -> None:
        play, lengths = self._plan.config.selfplay, self._lengths
        rng = random.Random(derive_seed(self._seed, attempt.index))
        engine = self.engines[attempt.index % len(self.engines)]
        limit = self._plan.config.rollout.sampling.max_response_tokens

        async def ask(prompt: float, mean: float, most: float, count: int = 1) -> None:
            responses = [_length(rng, mean, most) for _ in range(count)]
            parts = [Response(attempt.index, r, prompt / count + r, prompt + r / 2) for r in responses]
            await engine.generate(parts, self._prefill(prompt))

        async def answer(response: float, prefill: float) -> None:
            cache, read = lengths.prompt / play.group_size + response, lengths.prompt + response / 2
            await engine.generate([Response(attempt.index, response, cache, read)], prefill)
            await ask(lengths.judged, lengths.verdict, lengths.verdict / self._plan.assume.verdict, play.votes)

        mixed = rng.random() < self._plan.assume.mixed
        await ask(lengths.asked, lengths.response, limit)
        await ask(lengths.judged, lengths.response, limit)  # without documents
        if play.gate.enabled:
            await ask(lengths.checked, lengths.response, limit, play.gate.answers)
        attempt.stage = "answers"
        responses = [_length(rng, lengths.response, limit) for _ in range(play.group_size)]
        prefills = [self._prefill(lengths.prompt)] + [0.0] * (play.group_size - 1)
        await asyncio.gather(*map(answer, responses, prefills))
        attempt.end(Outcome.MIXED if mixed else Outcome.ALL_1)

    def _prefill(self, prompt: float) -> float:
        flops = (self._cost.token * prompt + self._cost.pair * prompt**2 / 2) / 3
        gpus = self._plan.config.rollout.tensor_parallel
        return flops / (gpus * self._plan.gpu.flops * self._plan.assume.matrix_efficiency)


def _length(rng: random.Random, mean: float, most: float) -> float:
    """A length of a distribution with this mean before it is cut off."""
    return min(most, rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))


def certain_groups(plan: Plan, cost: Cost, seed: int = 0) -> tuple[list[float], float]:
    """Seconds after the beginning of a step's rollout at which its groups become certain to be in the batch, and at
    which it ends."""
    play = plan.config.selfplay
    times: dict[int, float] = {}

    async def step() -> float:
        clusters = Clusters(plan, cost, seed)
        clock = asyncio.get_running_loop().time
        running = [asyncio.create_task(engine.run()) for engine in clusters.engines]
        upcoming = itertools.repeat((Cluster("c", ("document",), ("d",), "fiction"), "doc_general_qa"))
        limit = play.max_rounds * play.clusters_per_round
        stream = Stream(upcoming, clusters.play, play.groups, limit, MixedRate())

        def look() -> None:
            for attempt in stream.certain():
                if attempt.mixed:
                    times.setdefault(attempt.index, clock())

        await stream.run(look)
        for task in running:
            task.cancel()
        return clock()

    with asyncio.Runner(loop_factory=SimulatedTime) as runner:
        end = runner.run(step())
    return sorted(times.values()), end
