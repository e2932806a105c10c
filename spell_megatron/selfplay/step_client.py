"""The engines as one step of self-play sees them: derived seeds, one version of the weights, samples of replies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from spell_megatron.errors import UserError
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import Role, Sample
from spell_megatron.selfplay.interfaces import Client, Completion, Tokenizer
from spell_megatron.selfplay.seeds import derive_seed

Result = TypeVar("Result")


class Prompt(NamedTuple):
    """A prompt as text and as token ids."""

    text: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Reply:
    """A completion and its text."""

    completion: Completion
    text: str

    @property
    def truncated(self) -> bool:
        """Whether the engine stopped at the limit of tokens."""
        return self.completion.finish_reason == "length"


class StepClient:
    """Generates for the attempts of one step.

    Args:
        seed: of the run. The seed of a request depends on it, the step, the attempt, the role and the index.
        weight_version: the only version of the weights that may have answered.
    """

    def __init__(self, client: Client, tokenizer: Tokenizer, seed: int, step: int, weight_version: str) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self._seed = seed
        self._step = step
        self._weight_version = weight_version
        # One thread: no tokenizer need bear two at a time.
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    def seed(self, attempt: Attempt, purpose: str, index: int) -> int:
        """The seed for one use of randomness in an attempt; `purpose` is a role, or another name."""
        return derive_seed(self._seed, self._step, attempt.index, attempt.cluster.id, purpose, index)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """What some work returns that takes long with long documents; meanwhile the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def prompt(self, write: Callable[[], str], documents: Sequence[str] = ()) -> Prompt:
        """The prompt that a function writes, with its token ids; `documents` stand in it, in this order."""

        def prompt() -> Prompt:
            text = write()
            return Prompt(text, self.tokenizer.prompt_ids(text, documents))

        return await self.in_thread(prompt)

    async def generate(
        self,
        attempt: Attempt,
        purpose: str,
        prompt: Prompt,
        max_tokens: int,
        index: int = 0,
        n: int = 1,
        prompt_routing: bool = True,
    ) -> list[Reply]:
        """`n` replies to a prompt.

        Args:
            index: tells requests of an attempt with the same purpose apart.
            prompt_routing: whether the engines return the routing of the prompt's tokens too (mixture of experts).

        Raises:
            UserError: an engine answered with another version of the weights.
        """
        completions = await self.client.generate(
            prompt.ids,
            n=n,
            seed=self.seed(attempt, purpose, index),
            max_tokens=max_tokens,
            affinity=attempt.cluster.id,
            prompt_routing=prompt_routing,
        )
        for completion in completions:
            if completion.weight_version != self._weight_version:
                raise UserError(
                    f"An engine answered with weights of version {completion.weight_version!r} in step {self._step}, "
                    f"which must use {self._weight_version!r}. Updates on mixed versions are refused; "
                    "make sure that no other run pushes weights to the same engines."
                )
        return [Reply(completion, self.tokenizer.decode(completion.token_ids)) for completion in completions]

    def sample(
        self, attempt: Attempt, role: Role, group: str, prompt: Prompt, reply: Reply, documents: Sequence[int] = ()
    ) -> Sample:
        """A sample with reward 0 and no outcome yet; the caller fills in what it learns later.

        `group` is the task for the questioner; for the others it is what follows the question's uid.
        """
        uid = f"{self._step}.{attempt.index}"
        completion = reply.completion
        return Sample(
            uid=uid,
            group=group if role == "questioner" else f"{uid}{group}",
            role=role,
            task=attempt.task,
            cluster_id=attempt.cluster.id,
            prompt_ids=prompt.ids,
            response_ids=completion.token_ids,
            logprobs=completion.logprobs,
            weight_version=completion.weight_version,
            reward=0.0,
            prompt=prompt.text,
            response=reply.text,
            document_ids=[attempt.cluster.document_ids[i] for i in documents],
            truncated=reply.truncated,
            routing=completion.routing,
        )
