"""What self-play needs of the engines and of the policy's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Completion(Protocol):
    """One sampled continuation of a prompt (`rollout.client.Completion` says what each value means)."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[float]: ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def weight_version(self) -> str: ...

    @property
    def routing(self) -> np.ndarray | None: ...


class Client(Protocol):
    """Generates text on the engines (`rollout.client.Client` does it over HTTP)."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int,
        seed: int,
        max_tokens: int,
        affinity: str,
        prompt_routing: bool = True,
    ) -> Sequence[Completion]: ...


class Tokenizer(Protocol):
    """The policy's tokenizer (`tokenizer.PolicyTokenizer`)."""

    def prompt_ids(self, text: str, documents: Sequence[str] = ()) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def count(self, text: str) -> int: ...
