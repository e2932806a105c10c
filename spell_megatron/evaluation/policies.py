"""What answers the questions of an evaluation: engines, or a server with OpenAI's API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from spell_megatron.config.schema import RolloutConfig, SamplingConfig
from spell_megatron.evaluation.openai_server import OpenAIServer, Reply
from spell_megatron.evaluation.prompt_cut import cut_ids, cut_text
from spell_megatron.rollout.client import Client
from spell_megatron.rollout.engines import Engines
from spell_megatron.tokenizer import PolicyTokenizer


class Policy(Protocol):
    """What answers: engines, or a server with OpenAI's API."""

    def prompt(self, text: str) -> tuple[Any, int, bool]:
        """(what `sample` takes, its tokens, whether its middle was taken out to fit)."""

    async def sample(self, prompt: Any, seed: int, affinity: str) -> Reply:
        """One answer to a prompt."""


class EnginePolicy:
    """The engines of a run. Prompts are token ids from end to end: their cut is exact, and never tokenised again."""

    def __init__(self, client: Client, tokenizer: PolicyTokenizer, sampling: SamplingConfig) -> None:
        self._client, self._tokenizer, self._sampling = client, tokenizer, sampling

    def prompt(self, text: str) -> tuple[list[int], int, bool]:
        return cut_ids(self._tokenizer, text, self._sampling.max_prompt_tokens)

    async def sample(self, prompt: list[int], seed: int, affinity: str) -> Reply:
        completion = (
            await self._client.generate(
                prompt,
                n=1,
                seed=seed,
                max_tokens=self._sampling.max_response_tokens,
                affinity=affinity,
                prompt_routing=False,
            )
        )[0]
        text = self._tokenizer.decode(completion.token_ids)
        return Reply(text, completion.finish_reason == "length", len(completion.token_ids))


class CompletionsPolicy:
    """A model behind OpenAI's /completions: token ids go there, exactly as to engines."""

    def __init__(self, server: OpenAIServer, tokenizer: PolicyTokenizer, sampling: SamplingConfig) -> None:
        self._server, self._tokenizer, self._sampling = server, tokenizer, sampling

    def prompt(self, text: str) -> tuple[list[int], int, bool]:
        return cut_ids(self._tokenizer, text, self._sampling.max_prompt_tokens)

    async def sample(self, prompt: list[int], seed: int, affinity: str) -> Reply:
        return await self._server.complete(prompt, **_options(self._sampling, seed))


class ChatPolicy:
    """A model behind OpenAI's /chat/completions: text goes there, and the server applies its chat template.

    The limit of a prompt then holds for its text without the template, counted by this tokenizer.
    """

    def __init__(self, server: OpenAIServer, tokenizer: PolicyTokenizer, sampling: SamplingConfig) -> None:
        self._server, self._tokenizer, self._sampling = server, tokenizer, sampling

    def prompt(self, text: str) -> tuple[str, int, bool]:
        return cut_text(self._tokenizer, text, self._sampling.max_prompt_tokens)

    async def sample(self, prompt: str, seed: int, affinity: str) -> Reply:
        return await self._server.chat(prompt, **_options(self._sampling, seed))


def _options(sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_response_tokens,
        "seed": seed,
    }


@asynccontextmanager
async def engine_policy(engines: Engines, tokenizer: PolicyTokenizer, rollout: RolloutConfig) -> AsyncIterator[Policy]:
    """The policy that some engines serve. Engines that fail are started again."""

    def revive() -> list[str]:
        engines.restart(engines.failed())
        return engines.urls

    async with Client(
        engines.urls,
        engines.api_key,
        rollout.sampling,
        stop_token_ids=sorted(tokenizer.eos_ids),
        request_timeout=rollout.request_timeout,
        hang_timeout=rollout.hang_timeout,
        concurrency=rollout.concurrency,
        revive=revive,
    ) as client:
        yield EnginePolicy(client, tokenizer, rollout.sampling)


@asynccontextmanager
async def server_policy(
    server: OpenAIServer, tokenizer: PolicyTokenizer, sampling: SamplingConfig, chat: bool
) -> AsyncIterator[Policy]:
    """The policy behind a server; `chat`: by its chat route."""
    async with server:
        yield (ChatPolicy if chat else CompletionsPolicy)(server, tokenizer, sampling)
