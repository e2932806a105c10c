"""The self-play of a run: what the trainer asks for its next batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.selfplay.advantages import assign_advantages, shuffle_advantages
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import Group, Role, Sample, compose
from spell_megatron.selfplay.final_rows import FinalRows
from spell_megatron.selfplay.history import History
from spell_megatron.selfplay.interfaces import Client, Tokenizer
from spell_megatron.selfplay.judgments import JudgmentDraw
from spell_megatron.selfplay.metrics import step_metrics
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.roles import Roles
from spell_megatron.selfplay.sampler import ClusterSampler
from spell_megatron.selfplay.seeds import derive_seed
from spell_megatron.selfplay.step_client import StepClient
from spell_megatron.selfplay.stream import MixedRate, Stream
from spell_megatron.selfplay.tasks import Tasks, own_reward


@dataclass
class StepRollout:
    """All that one step rolled out.

    Attributes:
        batch: the rows of the update, with their advantages.
        late: those of them that `on_final` did not get.
        samples: every sample of the step's clusters.
        clusters: the ids of those clusters, in the order of admission.
        metrics: flat named numbers.
    """

    # Not part of the repr: the repr of an asyncio task contains its result's, and asyncio.Runner asks for it.
    batch: list[Sample] = field(repr=False)
    late: list[Sample] = field(repr=False)
    samples: list[Sample] = field(repr=False)
    clusters: list[str]
    metrics: dict[str, float]


class SelfPlay:
    """One policy in three roles, with the sampler of clusters and the history of a run.

    All randomness is derived from (seed, step, place in the stream, cluster, purpose, index). The history is read as
    it was when the step began. So a batch depends on seeds and weights, never on timing.

    Args:
        seed: of the run.
        untrained: roles that play as the others do, but have no rows in the batch.

    Raises:
        UserError: code of the user's own, which settings name, cannot be used.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        sampling: SamplingConfig,
        prompts: PromptSet,
        tokenizer: Tokenizer,
        sampler: ClusterSampler,
        history: History,
        seed: int,
        untrained: Collection[Role] = (),
    ) -> None:
        self.config = config
        self.sampling = sampling
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.history = history
        self.seed = seed
        self.untrained = untrained
        self._tasks = Tasks(config)
        self._own_reward = own_reward(config)
        self._rate = MixedRate()
        self._documents_fit: dict[str, bool] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for identical next batches (JSON)."""
        return {"sampler": self.sampler.state_dict(), "history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.history.load_state_dict(state["history"])

    async def roll_out(
        self,
        client: Client,
        step: int,
        weight_version: str,
        on_progress: Callable[[int, int], None] = lambda mixed_groups, admitted: None,
        on_final: Callable[[list[Sample]], None] | None = None,
    ) -> StepRollout:
        """Roll out one step, update the history and move the sampler on.

        `on_final` gets the rows of a group as soon as they are final (see `FinalRows`); its order depends on timing.

        Raises:
            UserError: when the engines fail for good, or most clusters end in an error.
        """
        config = self.config
        step_client = StepClient(client, self.tokenizer, self.seed, step, weight_version)
        roles = Roles(
            config,
            self.sampling,
            self.prompts,
            self.history,
            step_client,
            self._documents_fit,
            self._tasks,
            self._own_reward,
        )
        limit = config.max_rounds * config.clusters_per_round
        stream = Stream(self.sampler.upcoming(), roles.play, config.groups, limit, self._rate)
        draw = JudgmentDraw(config, self.seed, step)
        final = FinalRows(config, draw, self.untrained, on_final) if on_final else None

        def progress() -> None:
            if final is not None:
                final.look(stream.certain(), stream.possible())
            on_progress(stream.mixed, len(stream.attempts))

        attempts = await stream.run(progress)

        self.sampler.advance(len(attempts))
        entered = sum(self.history.admit(a.task, a.cluster.id, a.entry) for a in attempts if a.entry is not None)
        self._rate.forget()
        batch = self._compose(attempts, step, draw)
        metrics = step_metrics(attempts, len(stream.attempts), batch, config.tasks, self.history, entered)
        samples = [sample for attempt in attempts for sample in attempt.samples]
        late = [sample for sample in batch if final is None or sample not in final]
        return StepRollout(batch, late, samples, [attempt.cluster.id for attempt in attempts], metrics)

    def _compose(self, attempts: Sequence[Attempt], step: int, draw: JudgmentDraw) -> list[Sample]:
        """The update's rows in a fixed order, with advantages."""
        groups = [Group(a.answers[0].uid, a.task, a.question, a.answers) for a in attempts if a.mixed]
        negatives = [a.question for a in attempts if a.question and a.outcome and a.outcome.negative]
        rng = random.Random(derive_seed(self.seed, step, "batch"))
        batch = compose(groups, negatives, draw.in_order(attempts), self.config, rng)
        assign_advantages(batch, self.config.questioner.advantage_group)
        if self.config.shuffle_rewards:
            shuffle_advantages(batch, rng)
        return [sample for sample in batch if sample.role not in self.untrained]
