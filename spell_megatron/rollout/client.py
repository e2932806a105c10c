"""Generation over HTTP: token ids in, token ids and their log-probabilities out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout.slots import Slots
from spell_megatron.rollout.wire import Aborted, Body, Completion, GenerationError, PromptJson, read_answer

log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.2, 1.0, 3.0, 10.0)
_REST_SECONDS = 15.0
_SPARE_FILES = 64
"""Files that this process may open besides its connections to engines."""
_LARGE_BYTES = 1 << 22
"""Answers with more than this hold the routing of a prompt, and take so long to read that a thread does."""


class _NoEngine(Exception):
    """No engine could be reached."""


class _Hangs(Exception):
    """The engine has a request and does not even answer a call."""


@dataclass
class _Replica:
    url: str
    slots: Slots
    resting_until: float = 0.0
    probe: asyncio.Task[bool] | None = None


def http_session(api_key: str | None, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    """Connections to model servers, as many as are asked for; the key (None: none) is sent as a bearer token."""
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=timeout,
        # Servers of others may close connections that were idle for 5 seconds; reusing one at that moment fails.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
    )


def _allow_files(more: int) -> int:
    """Let this process have so many more files open, and some to spare; connections are files.

    Returns: how many more it may have, which are fewer where the hard limit forbids it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited:
        return more
    wanted = soft + more + _SPARE_FILES
    limit = wanted if hard == unlimited else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(more, limit - len(os.listdir("/proc/self/fd")) - _SPARE_FILES)


class Client:
    """Samples completions from one or several replicas of the policy.

    Use as an async context manager, inside one event loop. Cancelling the task that awaits
    `generate` closes its connection, on which the engine aborts the request.

    Args:
        urls: addresses of the vLLM servers, all serving the same weights.
        api_key: key that the servers demand.
        sampling: temperature and top_p of every request that is not greedy.
        stop_token_ids: tokens that end a completion (the tokenizer's end-of-sequence ids).
        request_timeout: seconds that a request may take, waiting in the engine included.
        hang_timeout: when a request has taken so many seconds, and again after as many, its engine is asked whether it
            is alive. If the engine does not answer in as many seconds, its requests go to another engine.
        concurrency: the engines' --max-num-seqs. At most as many requests per replica are in
            flight, or fewer if this process may not have so many files open; the others wait here, without a
            connection. Requests for more samples are cut.
        revive: called when no engine can be reached. It restarts them, and returns their addresses once they have the
            same weights. Requests under way are sent again, with the same seeds. Nothing else runs in the event loop
            until it returns. None: the UserError below is raised instead.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str,
        sampling: SamplingConfig,
        *,
        stop_token_ids: Sequence[int],
        request_timeout: float = 3600.0,
        hang_timeout: float = 300.0,
        concurrency: int = 256,
        revive: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        self._api_key = api_key
        self._sampling = sampling
        self._stop_token_ids = sorted(stop_token_ids)
        self._timeout = aiohttp.ClientTimeout(total=request_timeout, sock_connect=30.0)
        self._hang_timeout = hang_timeout
        self._concurrency = self._at_a_time = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._revive, self._revived = revive, 0
        self._prompt_json = PromptJson()
        self._reading = asyncio.Lock()
        self.use(urls)

    def use(self, urls: Sequence[str]) -> None:
        """From now on send requests to these engines. What comes first is now served first (see `affinity`)."""
        if not urls:
            raise ValueError("Client needs the address of at least one engine")
        self._places: dict[str, int] = {}
        self._find(urls)

    def _find(self, urls: Sequence[str]) -> None:
        self._replicas = [_Replica(url.rstrip("/"), Slots(self._at_a_time)) for url in urls]

    async def __aenter__(self) -> Client:
        allowed = _allow_files(self._concurrency * len(self._replicas)) // len(self._replicas)
        if allowed < self._concurrency:
            self._at_a_time = max(1, allowed)
            log.warning(
                "this process may have too few files open: each engine gets at most %d requests at a time, not %d "
                "(rollout.concurrency), so rollouts are slower; raise the hard limit (ulimit -Hn)",
                self._at_a_time,
                self._concurrency,
            )
            self._find([replica.url for replica in self._replicas])
        # The slots bound the sockets, so the connector need not; a request that waited for
        # a slot of the connector would have its timeout running.
        self._session = http_session(self._api_key, self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()
        self._session = None

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int,
        seed: int,
        max_tokens: int,
        affinity: str,
        greedy: bool = False,
        prompt_routing: bool = True,
    ) -> list[Completion]:
        """Samples n completions of a prompt.

        The same prompt, seed and weights give the same n completions, on whichever replica and
        however often they are asked for (up to rounding that depends on what else is in the
        engine's batch).

        Args:
            prompt_ids: token ids of the prompt.
            n: number of completions; completion i has a seed of its own, derived from (seed, i).
            seed: any integer.
            max_tokens: longest completion, in tokens.
            affinity: requests with equal affinity go to the same replica, so that they meet the
                same prefix cache, as long as it is alive. An affinity has the priority of its first request: what
                was begun first ends first, where engines have more requests than they can serve at a time.
            greedy: take the likeliest token every time instead of sampling.
            prompt_routing: have the routing of the prompt returned too. It is long, and the same for all
                completions of a prompt that the engine has in its prefix cache.

        Raises:
            GenerationError: the engine refused the request (too long a prompt, say), failed at it
                repeatedly, did not answer it in time, or answered with tokens of more than one
                weight version.
            UserError: no replica can be reached.
        """
        routed = len(prompt_ids) if prompt_routing else 0
        wanted = self._params(len(prompt_ids), 1 if greedy else n, seed, max_tokens, greedy, prompt_routing)
        priority = self._places.setdefault(affinity, len(self._places))
        with self._prompt_json.of(prompt_ids) as prompt:
            bodies = [Body(prompt, params, priority) for params in wanted]
            answers = await asyncio.gather(*(self._send(body, affinity, routed) for body in bodies))
        completions = [completion for answer in answers for completion in answer]
        return completions * n if greedy else completions

    def _params(
        self, prompt_tokens: int, n: int, seed: int, max_tokens: int, greedy: bool, prompt_routing: bool
    ) -> Iterator[dict[str, Any]]:
        """The sampling parameters of the requests for n samples, of at most `concurrency` samples each."""
        params: dict[str, Any] = {
            "temperature": 0.0 if greedy else self._sampling.temperature,
            "top_p": 1.0 if greedy else self._sampling.top_p,
            "max_tokens": max_tokens,
            "logprobs": 0,
            "stop_token_ids": self._stop_token_ids,
            "detokenize": False,
        }
        if not prompt_routing:
            params["routed_experts_prompt_start"] = prompt_tokens
        # vLLM gives sample i the seed `seed + i`: a hashed base keeps the samples of neighbouring
        # seeds apart, and lets a large n be cut into requests that give the same samples.
        base = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "big")
        for first in range(0, n, self._concurrency):
            yield params | {"n": min(self._concurrency, n - first), "seed": base + first}

    async def _send(self, body: Body, affinity: str, routed_prompt: int) -> list[Completion]:
        """Posts a request, again if engines had to be revived for it."""
        while True:
            revived = self._revived
            try:
                return await self._try(body, affinity, routed_prompt)
            except _NoEngine as error:
                if revived != self._revived:
                    continue
                if self._revive is None:
                    raise UserError(str(error)) from error
                log.warning("%s", error)
                self._find(self._revive())
                self._revived += 1

    async def _try(self, body: Body, affinity: str, routed_prompt: int) -> list[Completion]:
        """Posts a request to the replica of its affinity, or to another one while that is down."""
        for delay in (0.0, *_RETRY_SECONDS):
            await asyncio.sleep(delay)
            replica = self._choose(affinity)
            try:
                async with replica.slots.one(body.priority):
                    answer = await self._watched(replica, body)
                return await self._read(answer, routed_prompt)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, _ServerFault, Aborted, _Hangs) as error:
                fault = error
                if replica.resting_until <= time.monotonic():
                    log.warning("the engine at %s fails: %s", replica.url, error or type(error).__name__)
                replica.resting_until = time.monotonic() + _REST_SECONDS
                if isinstance(error, _Hangs):
                    replica.resting_until = math.inf
                if all(other.resting_until == math.inf for other in self._replicas):
                    break
        if isinstance(fault, _ServerFault | Aborted) and await self._responds(replica):
            raise GenerationError(f"every attempt at a request failed; the last: {replica.url}: {fault}")
        urls = ", ".join(replica.url for replica in self._replicas)
        raise _NoEngine(
            f"No engine answers ({replica.url}: {fault or type(fault).__name__}), after "
            f"{len(_RETRY_SECONDS)} more attempts at all replicas ({urls}). Look into their logs; start "
            "them again, or correct rollout.urls, and resume the run from its last checkpoint."
        )

    async def _read(self, answer: bytes, routed_prompt: int) -> list[Completion]:
        if len(answer) > _LARGE_BYTES:
            return await asyncio.to_thread(read_answer, answer, routed_prompt)
        # Many answers come at a time. After each, the event loop looks at its sockets.
        async with self._reading:
            completions = read_answer(answer, routed_prompt)
            await asyncio.sleep(0)
        return completions

    def _choose(self, affinity: str) -> _Replica:
        """Rendezvous hashing over the replicas that did not just fail (over all if all did)."""
        now = time.monotonic()
        awake = [replica for replica in self._replicas if replica.resting_until <= now]
        return max(
            awake or self._replicas,
            key=lambda replica: hashlib.blake2b(f"{affinity}\0{replica.url}".encode()).digest(),
        )

    async def _watched(self, replica: _Replica, body: Body) -> bytes:
        """Posts a request, and asks the engine now and then whether it is alive.

        Raises:
            _Hangs: it is not.
        """
        request = asyncio.ensure_future(self._post(replica.url, body))
        try:
            while not (await asyncio.wait({request}, timeout=self._hang_timeout))[0]:
                if not await self._responds(replica):
                    raise _Hangs(f"it does not answer within {self._hang_timeout:g} s (rollout.hang_timeout)")
            return request.result()
        finally:
            request.cancel()

    async def _responds(self, replica: _Replica) -> bool:
        """Whether all processes of an engine answer; one question serves all requests that ask at a time."""
        if replica.probe is None or replica.probe.done():
            replica.probe = asyncio.ensure_future(self._probe(replica.url))
        return await asyncio.shield(replica.probe)

    async def _probe(self, url: str) -> bool:
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=self._hang_timeout)
        body = {"method": "spell_describe", "args": []}
        try:
            async with self._session.post(f"{url}/collective_rpc", json=body, timeout=limit) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _post(self, url: str, body: Body) -> bytes:
        assert self._session is not None, "use `async with Client(...)`"
        try:
            async with self._session.post(f"{url}/inference/v1/generate", data=body) as response:
                answer = await response.read()
        except aiohttp.ConnectionTimeoutError:
            raise
        except TimeoutError as error:
            raise GenerationError(
                f"{url} did not answer a request within {self._timeout.total:g} s (rollout.request_timeout)"
            ) from error
        if response.status == 200:
            return answer
        text = answer.decode(errors="replace")
        if response.status >= 500:
            raise _ServerFault(f"HTTP {response.status}: {text[:300]}")
        if response.status == 401:
            raise UserError(
                f"The engine at {url} refuses the API key. Set the environment variable named by "
                "rollout.api_key_env to the key it was started with (its VLLM_API_KEY)."
            )
        raise GenerationError(f"{url} refused a request: HTTP {response.status}: {text[:500]}")


class _ServerFault(Exception):
    """A 5xx answer: the engine is overloaded, stopping or broken; another may do better."""
