"""What goes over the wire of vLLM's generation route: bodies of requests, and answers.

A step sends thousands of requests with prompts of 100,000 tokens and gets as many answers back. So the JSON of a prompt
is made once for all requests with it, and of an answer only what is needed is read.
"""

from __future__ import annotations

import binascii
import contextlib
import io
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from aiohttp import Payload

UPDATING = "updating"
"""Beginning of the weight version of an engine whose weights are being replaced; no completion may carry it."""

_BASE64_PART = 1 << 20  # characters, a multiple of 4


class GenerationError(RuntimeError):
    """An engine refused or broke a request, and trying it again would not help."""


class Aborted(GenerationError):
    """An engine has answered a request before its end, as one does that is told to stop. Another one may finish it."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    Attributes:
        token_ids: sampled tokens, the end-of-sequence token included when there is one.
        logprobs: natural log-probability of each of them under the distribution that was sampled
            from (after temperature and, where top_p < 1, its renormalisation).
        finish_reason: `stop` (end-of-sequence token) or `length` (cut at max_tokens).
        weight_version: version of the weights that sampled all of it.
        routing: of a mixture of experts, if the engine returns them, the experts to which it sent the tokens
            before the last: integers [tokens, layers, experts per token]. Those of the prompt come first.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str
    weight_version: str
    routing: np.ndarray | None = field(default=None, compare=False, repr=False)


def ids_json(ids: Sequence[int]) -> bytes:
    return msgspec.json.encode(list(ids))


class PromptJson:
    """The JSON of the prompts that requests are under way with, made once for all requests with the same object."""

    def __init__(self) -> None:
        self._made: dict[int, bytes] = {}
        self._users: dict[int, int] = {}

    @contextlib.contextmanager
    def of(self, prompt_ids: Sequence[int]) -> Iterator[bytes]:
        """The JSON of a prompt's token ids; inside, nobody may change them."""
        key = id(prompt_ids)  # nothing else gets this id while the prompt is in use here
        if key not in self._made:
            self._made[key] = ids_json(prompt_ids)
        self._users[key] = self._users.get(key, 0) + 1
        try:
            yield self._made[key]
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._made[key], self._users[key]


class Body(Payload):
    """The body of a request. It holds no copy of the prompt's JSON, because thousands of requests wait at a time.

    priority: the engine serves lower ones first.
    """

    def __init__(self, prompt_json: bytes, sampling_params: Mapping[str, Any], priority: int = 0) -> None:
        self.priority = priority
        self._parts = (
            b'{"token_ids":',
            prompt_json,
            b',"sampling_params":',
            msgspec.json.encode(sampling_params),
            b',"priority":%d}' % priority if priority else b"}",
        )
        super().__init__(self._parts, content_type="application/json")
        self._size = sum(map(len, self._parts))

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._parts).decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        for part in self._parts:
            await writer.write(part)


class _Token(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str


class _Choice(msgspec.Struct):
    index: int
    finish_reason: str | None
    token_ids: list[int]
    logprobs: _Logprobs
    weight_versions: list[_Span] | None = None
    routed_experts: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_ANSWER = msgspec.json.Decoder(_Answer)


def read_answer(answer: bytes, routed_prompt: int) -> list[Completion]:
    """The completions in an engine's answer, in their order.

    Args:
        answer: JSON.
        routed_prompt: number of the prompt's tokens whose routing was asked for.

    Raises:
        Aborted: the engine has not ended a completion.
        GenerationError: it is no answer of vLLM's route, or has tokens of more than one weight version.
    """
    try:
        choices = _ANSWER.decode(answer).choices
    except msgspec.MsgspecError as error:
        raise GenerationError(f"an engine's answer cannot be read ({error}): {answer[:300]!r}") from error
    return [_completion(choice, routed_prompt) for choice in sorted(choices, key=lambda choice: choice.index)]


def _completion(choice: _Choice, routed_prompt: int) -> Completion:
    reason = choice.finish_reason
    if reason == "abort":
        raise Aborted("it has aborted a request, as an engine does that is told to stop")
    if reason not in ("stop", "length"):
        raise GenerationError(f"the engine ended a completion with {reason!r}, not at its end or its limit")
    versions = sorted({span.version for span in choice.weight_versions or ()})
    if len(versions) != 1 or versions[0].startswith(UPDATING):
        raise GenerationError(
            f"a completion was sampled by weight versions {versions}, not by one complete version; "
            "no request may run across a weight update"
        )
    routing = None
    if choice.routed_experts is not None:
        routing = _array(choice.routed_experts)
        expected = routed_prompt + len(choice.token_ids) - 1
        if len(routing) != expected:
            raise GenerationError(f"the engine returned the experts of {len(routing)} tokens, not of {expected}")
    logprobs = array("f", [token.logprob for token in choice.logprobs.content])
    return Completion(array("i", choice.token_ids), logprobs, reason, versions[0], routing)


def _array(text: str) -> np.ndarray:
    """An array that vLLM wrote as base64 of a .npy file."""
    content = bytearray()
    # The routing of 100,000 tokens is 50 MB of text. Between its parts, other threads go on.
    for start in range(0, len(text), _BASE64_PART):
        content += binascii.a2b_base64(text[start : start + _BASE64_PART])
    return np.load(io.BytesIO(content), allow_pickle=False)
