"""One vLLM server as seen over HTTP, and whether it suits a run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import MaxRetryError

from spell_megatron.config.schema import ModelConfig, RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout.transports import TRANSPORTS

_WATCH_SECONDS = 5.0  # between looks at an engine that has been asked for something
_CONNECT_SECONDS = 10.0
_CUT_SECONDS = 60.0
"""How long an engine may be out of reach before it is taken for lost."""


class _Patience(Retry):
    """Connects again where an engine's machine cannot be reached, for half a minute and more.

    A request that may have arrived is never repeated.
    """

    def increment(self, method=None, url=None, response=None, error=None, _pool=None, _stacktrace=None):
        if _refused(error):
            raise MaxRetryError(_pool, url, error) from error
        return super().increment(method, url, response, error, _pool, _stacktrace)


def _refused(error: BaseException | None) -> bool:
    """Whether the engine's machine says that nobody listens there. Else it could not be reached, or not in time."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


class Engine:
    """One vLLM server as seen over HTTP."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy stands between us and an engine
        self._session.headers["Authorization"] = f"Bearer {api_key}"
        # A server closes a connection that was idle, and tells nobody while the network is cut. The next request on it
        # would fail, and could not be made again, as it may have arrived.
        self._session.headers["Connection"] = "close"
        patience = _Patience(total=None, connect=6, read=False, redirect=0, status=0, other=0, backoff_factor=0.5)
        self._session.mount(f"{self.url}/", HTTPAdapter(max_retries=patience))

    def healthy(self) -> bool:
        """Whether the server answers its health check."""
        try:
            return _health(self.url) == 200
        except requests.RequestException:
            return False

    def responds(self, seconds: float) -> bool:
        """Whether it and all its workers answer a call within `seconds`; an engine that hangs calls itself healthy.

        One that cannot be reached, which is not the same as having ended, is asked again for a minute.
        """
        deadline = time.monotonic() + _CUT_SECONDS
        while True:
            try:
                return _health(self.url) == 200 and bool(self.call("spell_describe", timeout=seconds))
            except requests.ConnectionError as error:
                if _refused(error) or time.monotonic() > deadline:
                    return False
            except requests.RequestException:
                return False
            time.sleep(1)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON of a route. Raises requests.RequestException."""
        response = self._session.get(f"{self.url}{path}", timeout=60)
        response.raise_for_status()
        return response.json()

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout: float = 600.0,
    ) -> dict[str, Any]:
        """POSTs to a route and returns its JSON, {} if there is none.

        Args:
            path: of the route.
            body: sent as JSON.
            params: of the query.
            timeout: seconds that the server may take between two pieces of its answer.

        Raises:
            requests.RequestException: no connection, no answer in time, an error status (the message then
                holds what the server said), or the engine ended meanwhile.
        """
        response = self._watched(
            lambda: self._session.post(
                f"{self.url}{path}", json=body, params=params, timeout=(_CONNECT_SECONDS, timeout)
            )
        )
        if not response.ok:
            raise requests.HTTPError(
                f"{path} at {self.url}: HTTP {response.status_code}: {response.text[:1000]}",
                response=response,
            )
        return response.json() if response.content else {}

    def _watched(self, request: Callable[[], requests.Response]) -> requests.Response:
        """A request's response; a ConnectionError if the engine ends meanwhile.

        A server whose core has died closes its port, but never answers the calls that are under way.
        """
        answer: Future[requests.Response] = Future()

        def ask() -> None:
            try:
                answer.set_result(request())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        while not wait([answer], timeout=_WATCH_SECONDS).done:
            if self._ended():
                raise requests.ConnectionError(f"{self.url} has ended while it was asked for something")
        return answer.result()

    def _ended(self) -> bool:
        """Whether the server is gone, or says that its core has died. One that is slow or out of reach is not."""
        try:
            return _health(self.url) >= 500
        except requests.RequestException as error:
            return _refused(error)

    def call(self, method: str, *args: str, timeout: float = 600.0) -> list:
        """Calls a method of `worker.WorkerExtension` in every worker; returns one result for each."""
        body = {"method": method, "args": list(args)}
        return self.post("/collective_rpc", body, timeout=timeout)["results"]


def _health(url: str) -> int:
    """The status of an engine's answer to a health check. Raises requests.RequestException."""
    with requests.Session() as session:  # the server may just be closing an open connection that was idle
        session.trust_env = False
        return session.get(f"{url}/health", timeout=_CONNECT_SECONDS).status_code


def check_engine(engine: Engine, model: ModelConfig, rollout: RolloutConfig, start_as: str) -> dict[str, Any]:
    """Checks that an engine suits the run.

    Args:
        start_as: command line that would start a suitable engine, for the user.

    Returns:
        What the engine says of itself (`worker.WorkerExtension.spell_describe`).

    Raises:
        UserError: it does not suit the run, with all the reasons; or it does not answer.
    """
    about, paused = _describe(engine, rollout.api_key_env, start_as)
    faults = list(_faults(about, model, rollout))
    if paused:
        faults.append("it is paused, perhaps by a weight update that was interrupted: restart it")
    if faults:
        raise UserError(
            f"The engine at {engine.url} does not suit the run: {'; '.join(faults)}. Start it as: {start_as}"
        )
    return about


def _describe(engine: Engine, key_variable: str, start_as: str) -> tuple[dict[str, Any], bool]:
    """What an engine says of itself, and whether it is paused."""
    if not engine.healthy():
        raise UserError(
            f"No healthy engine answers at {engine.url} (rollout.urls). Start it, wait until its /health "
            "answers, or correct the address."
        )
    try:
        about = engine.call("spell_describe", timeout=120)[0]
        paused = engine.get("/is_paused")["is_paused"]
        engine.get("/openapi.json")["paths"]["/inference/v1/generate"]
    except (requests.RequestException, KeyError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise UserError(
                f"The engine at {engine.url} refuses the API key. Set {key_variable} to the "
                "VLLM_API_KEY it was started with."
            ) from error
        raise UserError(
            f"The engine at {engine.url} lacks a route that the run needs ({error}). Start it as: {start_as}"
        ) from error
    return about, paused


def _faults(about: Mapping[str, Any], model: ModelConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Reasons why an engine that describes itself so does not suit the run."""
    wanted = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    text = wanted.get("text_config") or wanted
    sizes = [text.get(name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    architecture = (wanted.get("architectures") or ["without architectures"])[0]
    if [about["architecture"], about["sizes"]] != [architecture, sizes]:
        yield (
            f"it serves {about['architecture']} with hidden size, layers, vocabulary {about['sizes']}, but "
            f"model.path is {architecture} with {sizes}"
        )
    if "text_config" in wanted and not about["language_model_only"]:
        yield "it was started without --language-model-only: a push has no weights for its vision tower"
    if about["dtype"] != model.dtype:
        yield f"it computes in {about['dtype']}, but model.dtype is {model.dtype}"
    if rollout.quantization == "fp8" and not about["quantization"]:
        yield f"it computes linear layers in {about['dtype']}, but rollout.quantization is fp8"
    if rollout.batch_invariant and not about["batch_invariant"]:
        yield "it was started without VLLM_BATCH_INVARIANT=1, but rollout.batch_invariant is true"
    longest = rollout.sampling.longest_sequence
    if about["max_model_len"] < longest:
        yield (
            f"its --max-model-len {about['max_model_len']} is less than the {longest} "
            "tokens of the longest prompt and response in rollout.sampling"
        )
    if about["logprobs_mode"] != "processed_logprobs":
        yield f"its --logprobs-mode is {about['logprobs_mode']}, not processed_logprobs"
    transport = about["weight_transfer"]
    if transport is None:
        yield "it was started without --weight-transfer-config"
    elif transport not in TRANSPORTS:
        yield f"it receives weights by {transport!r}, and the trainer can send by {', '.join(TRANSPORTS)} only"
