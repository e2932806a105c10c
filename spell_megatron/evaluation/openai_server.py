"""Client of any server with OpenAI's API: completions of token ids, and chat."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import aiohttp

from spell_megatron.errors import UserError
from spell_megatron.rollout.client import http_session

_RETRIES = 5
_TRANSIENT = {408, 409, 425, 429}

NO_OTHER_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM takes what a request does not name from the model's generation_config.json. These turn it off."""


@dataclass(frozen=True)
class Reply:
    """What a server generated. `cut`: it ended at max_tokens. `tokens`: its length, None if the server did not say."""

    text: str
    cut: bool
    tokens: int | None


class OpenAIServer:
    """A model behind an OpenAI-compatible server. An async context manager.

    Requests turn off what else the server might do to the distribution (`NO_OTHER_SAMPLING`), until it refuses these
    fields: OpenAI's own API does not know them.

    Connections that fail, requests that time out, and answers 408, 409, 425, 429 and 5xx are tried again, up to five
    times after growing pauses.

    Args:
        url: address with the path of the API (`http://127.0.0.1:8000/v1`); without a path, /v1 is added.
        model: name by which the server knows the model.
        api_key: sent as a bearer token; None: none is.
        timeout: seconds that one request may take.
        purpose: what the server is, for messages: "judge (--judge)".

    Raises:
        UserError: by every request: it cannot be reached, refuses the request, or answers something else.
    """

    def __init__(self, url: str, model: str, api_key: str | None, timeout: float, purpose: str) -> None:
        url = url.rstrip("/")
        self.url = url if "/" in url.partition("://")[2] else f"{url}/v1"
        self.model, self._purpose = model, purpose
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=30.0)
        self._neutral: dict[str, float] = NO_OTHER_SAMPLING

    async def __aenter__(self) -> OpenAIServer:
        self._session = http_session(self._api_key, self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def complete(self, prompt_ids: list[int], **sampling: Any) -> Reply:
        """Continue token ids (/completions; vLLM, SGLang and others take ids for the prompt)."""
        return await self._ask("completions", {"prompt": prompt_ids, **sampling}, lambda choice: choice["text"])

    async def chat(self, text: str, **sampling: Any) -> Reply:
        """Answer one user turn (/chat/completions). Reasoning that the server returns apart is not in the reply."""
        messages = [{"role": "user", "content": text}]
        return await self._ask(
            "chat/completions", {"messages": messages, **sampling}, lambda choice: choice["message"]["content"]
        )

    async def _ask(self, route: str, body: dict[str, Any], text_of) -> Reply:
        answer = await self._post(route, {"model": self.model, **body})
        try:
            reply = json.loads(answer)
            choice = reply["choices"][0]
            text = text_of(choice) or ""  # null where all tokens were reasoning
            if not isinstance(text, str):
                raise TypeError("the text is none")
            tokens = (reply.get("usage") or {}).get("completion_tokens")
            return Reply(text, choice["finish_reason"] == "length", tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"The {self._purpose} at {self.url} does not answer as OpenAI's API does: {answer[:300]!r}. Check the "
                "address."
            ) from error

    async def _post(self, route: str, body: dict[str, Any]) -> str:
        fault = ""
        for attempt in range(_RETRIES + 1):
            if attempt:
                await asyncio.sleep(min(30.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))
            neutral = self._neutral
            try:
                async with self._session.post(
                    f"{self.url}/{route}",
                    data=json.dumps(body | neutral),
                    headers={"Content-Type": "application/json"},
                ) as response:
                    answer = await response.text()
            except aiohttp.InvalidURL as error:
                raise UserError(f"The address of the {self._purpose}, {self.url}, is not a URL.") from error
            except (aiohttp.ClientError, TimeoutError) as error:
                fault = f"{error}" or f"no answer within {self._timeout.total:g} s"
                continue
            if response.status == 200:
                return answer
            fault = f"HTTP {response.status}: {answer[:500]}"
            if response.status in (400, 422) and any(name in answer for name in neutral):
                self._neutral = {}
                continue
            if response.status in (401, 403):
                raise UserError(
                    f"The {self._purpose} at {self.url} refuses the key ({fault}). Put the right one into the "
                    "environment variable that holds it."
                )
            if response.status < 500 and response.status not in _TRANSIENT:
                raise UserError(
                    f"The {self._purpose} at {self.url} refuses a request for the model {self.model!r}: {fault}. "
                    "Check the address, the model's name and its longest input."
                )
        raise UserError(
            f"The {self._purpose} at {self.url} cannot be used ({fault}), after {_RETRIES} more attempts. Start it, or "
            "correct its address, and run the same command again: what is done stays done."
        )
