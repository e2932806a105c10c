"""Self-play and held-out validation around one policy, on engines: the bridge to asyncio."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.evaluation.questions import load_questions
from spell_megatron.evaluation.validation import validate
from spell_megatron.rollout.client import Client
from spell_megatron.rollout.wire import GenerationError
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.documents import load_clusters
from spell_megatron.selfplay.history import History
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler
from spell_megatron.selfplay.selfplay import SelfPlay, StepRollout
from spell_megatron.selfplay.tasks import Tasks
from spell_megatron.tokenizer import PolicyTokenizer

Result = TypeVar("Result")

_STOP_SECONDS = 0.5


class Director:
    """Talks to the engines for the trainer.

    Args:
        stop: asked now and then; anything but None and False: what is under way is given up.

    Raises:
        UserError: when documents, prompts, tokenizer or held-out questions, or code of the user's own, cannot be used.
    """

    def __init__(self, config: Config, stop: Callable[[], object] = lambda: None) -> None:
        self.config, self._stop = config, stop
        selfplay = config.selfplay
        self._tokenizer = PolicyTokenizer(config.model.path, config.model.prompt_date)
        self._tasks = Tasks(selfplay)
        self._prompts = PromptSet.load(selfplay.prompts, selfplay.questioner.quotes, self._tasks.own_prompts)
        sampler = ClusterSampler(
            load_clusters(config.data.documents, selfplay.known_tasks),
            selfplay.tasks,
            config.data.sources,
            selfplay.clusters_per_round,
            config.run.seed,
        )
        history = History(selfplay.questioner.history)
        untrained = [role for role, weight in config.training.role_weights.items() if weight == 0]
        self.selfplay = SelfPlay(
            selfplay,
            config.rollout.sampling,
            self._prompts,
            self._tokenizer,
            sampler,
            history,
            config.run.seed,
            untrained,
        )
        validation = config.validation
        self._questions = (
            load_questions(validation.questions, validation.limit, selfplay.known_tasks) if validation.questions else []
        )

    def connect(self, urls: Sequence[str], api_key: str, revive: Callable[[], Sequence[str]] | None = None) -> None:
        """Before anything else: where the engines are, and their key. `revive`: of `Client`."""
        rollout = self.config.rollout
        self._client = Client(
            urls,
            api_key,
            rollout.sampling,
            stop_token_ids=sorted(self._tokenizer.eos_ids),
            request_timeout=rollout.request_timeout,
            hang_timeout=rollout.hang_timeout,
            concurrency=rollout.concurrency,
            revive=revive,
        )
        self._runner = asyncio.Runner()
        self._runner.run(self._client.__aenter__())

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.__aexit__())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """The result of work on the engines; None if it is to be given up before there is one."""

        async def unless_stopped() -> Result | None:
            task = asyncio.ensure_future(work)
            try:
                while not (await asyncio.wait({task}, timeout=_STOP_SECONDS))[0]:
                    if self._stop():
                        return None
                return task.result()
            finally:
                task.cancel()
                await asyncio.wait({task})

        gc.disable()  # a look through all that is under way would stop the event loop for 0.2 s, and find nothing
        try:
            return self._runner.run(unless_stopped())
        except UserError:
            if self._stop():  # the end of a job ends the engines too
                return None
            raise
        except GenerationError as error:
            raise UserError(
                f"An engine cannot serve this run: {error}. Look into its log (of those started by the run in its "
                "folder logs), and resume the run from its last checkpoint."
            ) from error
        finally:
            gc.enable()

    def roll_out(
        self,
        step: int,
        weight_version: str,
        urls: Sequence[str],
        on_progress: Callable[[int, int], None],
        on_final: Callable[[list[Sample]], None] | None = None,
    ) -> StepRollout | None:
        """One step of self-play on the engines (see `SelfPlay.roll_out`); None: given up, and nothing has changed."""
        self._client.use(urls)
        return self._run(self.selfplay.roll_out(self._client, step, weight_version, on_progress, on_final))

    def validate(self, urls: Sequence[str], on_progress: Callable[[int], None]) -> dict[str, float] | None:
        """Accuracy of the engines' weights on the held-out questions, if there are any; None: given up."""
        self._client.use(urls)
        validation = self.config.validation
        return self._run(
            validate(
                self._client,
                self._tokenizer,
                self._prompts,
                self.config.rollout.sampling,
                self._questions,
                validation.samples,
                self.config.run.seed,
                self._tasks,
                on_progress,
            )
        )

    @property
    def held_out_questions(self) -> int:
        return len(self._questions)
