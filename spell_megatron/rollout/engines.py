"""The engines of a run as a group: opened, watched, restarted, put to sleep."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import requests

from spell_megatron.config.schema import ModelConfig, RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.rollout.engine import Engine, check_engine
from spell_megatron.rollout.engine_nodes import EngineNodes
from spell_megatron.rollout.placement import Device, transport_elsewhere
from spell_megatron.rollout.server import ServerSettings, start_command
from spell_megatron.rollout.servers import Servers
from spell_megatron.rollout.transports import TRANSPORTS
from spell_megatron.rollout.transports.transport import Transport

Result = TypeVar("Result")

MAX_RESTARTS = 3
"""How often engines may fail in one step; once more ends the run."""


class Source(Protocol):
    """Where engines come from: `Servers`, `EngineNodes` or `RunningEngines`.

    Attributes:
        restartable: whether `restart` starts servers, rather than waiting for somebody to do so.
    """

    restartable: bool

    def start(self) -> list[str]:
        """Starts the engines or waits for them; their addresses."""

    def restart(self, broken: Collection[str]) -> list[str]:
        """Replaces the engines at some addresses; the addresses of all engines."""

    def check(self) -> None:
        """Raises UserError if a server that this process started has ended."""

    def stop(self) -> None:
        """Ends the servers that this process started."""


class RunningEngines:
    """The servers of rollout.urls, which somebody else has started and may start again."""

    restartable = False

    def __init__(self, urls: Sequence[str], api_key: str, start_timeout: float) -> None:
        self._engines, self._seconds = [Engine(url, api_key) for url in urls], start_timeout

    def start(self) -> list[str]:
        return [engine.url for engine in self._engines]

    def restart(self, broken: Collection[str]) -> list[str]:
        """Waits until all engines answer."""
        deadline = time.monotonic() + self._seconds
        for engine in self._engines:
            while not engine.healthy():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{engine.url} did not answer for {self._seconds:g} s (rollout.start_timeout). Look into its "
                        "log, start it again, and resume the run from its last checkpoint."
                    )
                time.sleep(0.25)
        return self.start()

    def check(self) -> None:
        """Does nothing: this process started no server."""

    def stop(self) -> None:
        """Does nothing: this process started no server."""


class Engines:
    """The engines of a run. A context manager: leaving it ends the servers that were started here.

    Attributes:
        engines: one per replica.
        api_key: key that all of them demand.
        transport: how they receive weights.
        no_routing: why they do not return the experts of tokens, for users; "" if they do.
    """

    engines: list[Engine]
    transport: Transport

    def __init__(
        self,
        source: Source,
        api_key: str,
        check: Callable[[Engine], dict[str, Any]],
        *,
        hang_timeout: float,
        log_folder: Path,
    ) -> None:
        self.source, self.api_key, self.no_routing = source, api_key, ""
        self._check_engine, self._hang_timeout, self._log_folder = check, hang_timeout, log_folder
        self._restarts = 0
        self._about: dict[str, dict[str, Any]] = {}
        """What each engine says of itself, by its address."""

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    @classmethod
    def open(
        cls,
        model: ModelConfig,
        rollout: RolloutConfig,
        log_folder: Path,
        *,
        device: Device,
        seed: int,
        routing: bool,
        trainers: int,
        rendezvous: Rendezvous | None = None,
    ) -> Engines:
        """Attaches to the engines of other nodes or of rollout.urls, or starts rollout.replicas servers here.

        Args:
            model, rollout: sections of the configuration.
            log_folder: where the logs of started servers go, as engine-<replica>.log.
            device, seed: of the section `run`.
            routing: have the engines of a mixture of experts return the experts of each token, where vLLM can.
            trainers: trainer processes that need GPUs of this machine.
            rendezvous: where the engine nodes of a job publish their servers (see `engine_nodes`), if it has any.

        Raises:
            UserError: a port is taken, a server dies or does not become ready in
                rollout.start_timeout seconds, or an engine does not suit the configuration.
        """
        settings = ServerSettings(model, rollout, seed, routing)
        start_as = start_command(settings, transport_elsewhere(device))
        key = _key(rollout, rendezvous)
        source: Source
        if rendezvous and rendezvous.engine_nodes:
            source = EngineNodes(rendezvous, rollout.start_timeout)
        elif rollout.urls:
            source = RunningEngines(rollout.urls, key, rollout.start_timeout)
        else:
            source = Servers(settings, key, log_folder, range(rollout.replicas), device=device, trainers=trainers)
        engines = cls(
            source,
            key,
            lambda engine: check_engine(engine, model, rollout, start_as),
            hang_timeout=rollout.hang_timeout,
            log_folder=log_folder,
        )
        try:
            engines._use(source.start())
        except BaseException:
            engines.stop()
            raise
        return engines

    def _use(self, urls: Sequence[str], kept: Collection[str] = ()) -> None:
        """Takes the engines at these addresses, once they suit the run. Those to be `kept` do, and may be asleep."""
        self.engines = [Engine(url, self.api_key) for url in urls]
        self._about = {
            engine.url: self._about[engine.url] if engine.url in kept else self._check_engine(engine)
            for engine in self.engines
        }
        described = list(self._about.values())
        names = {about["weight_transfer"] for about in described}
        if len(names) > 1:
            raise UserError(
                f"The engines of rollout.urls receive weights by different backends ({sorted(names)}). "
                "Start all with the same --weight-transfer-config."
            )
        self.transport = TRANSPORTS[names.pop()]
        silent = [engine.url for engine, about in zip(self.engines, described) if not about["routed_experts"]]
        if not silent:
            self.no_routing = ""
        elif self.transport.on_cpus:
            self.no_routing = "vLLM does not return the experts of tokens on CPUs"
        else:
            self.no_routing = f"the engine at {silent[0]} was started without --enable-return-routed-experts"

    @property
    def restartable(self) -> bool:
        """Whether `restart` starts servers, rather than waiting for somebody to do so."""
        return self.source.restartable

    def check(self) -> None:
        """Raises UserError if a server that was started here has ended."""
        self.source.check()

    def failed(self) -> list[int]:
        """Engines that have ended or hang."""
        responds = self._at_once(lambda engine: engine.responds(self._hang_timeout))
        return [number for number, well in enumerate(responds) if not well]

    def health(self) -> list[dict[str, Any]]:
        """Address of each engine, and whether it says that it is well."""
        return self._at_once(lambda engine: {"url": engine.url, "healthy": engine.healthy()})

    def _at_once(self, action: Callable[[Engine], Result]) -> list[Result]:
        """Results of an action on each engine; an engine that does not answer keeps no other waiting."""
        with ThreadPoolExecutor(len(self.engines)) as threads:
            return list(threads.map(action, list(self.engines)))

    def sleep(self) -> None:
        """Has engines that share their GPUs with the trainer free weights and KV cache, until `wake`."""
        self._if_colocated("/sleep", {"level": "2", "mode": "wait"})

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Has sleeping engines allocate memory again: for their weights, which are pushed next, or for the KV cache."""
        self._if_colocated("/wake_up", {"tags": part})

    def _if_colocated(self, path: str, params: dict[str, str]) -> None:
        if not self.transport.colocated:
            return
        try:
            self._at_once(lambda engine: engine.post(path, params=params))
        except requests.RequestException as error:
            raise UserError(
                f"An engine cannot free or take GPU memory ({error}). Look into its log; if memory is short, lower "
                "rollout.gpu_memory_utilization or training.tokens_per_microbatch, and resume the run."
            ) from error

    def new_step(self) -> None:
        """Starts to count failures from zero."""
        self._restarts = 0

    def restart(self, numbers: Sequence[int]) -> None:
        """Restarts the servers of these engines. They then have other addresses, and the model folder's weights.

        Engines of rollout.urls are not restarted from here: it waits until all of them answer.

        Raises:
            UserError: it was called more than MAX_RESTARTS times in this step, or they do not become ready.
        """
        if self._restarts == MAX_RESTARTS:
            self.check()
            raise UserError(
                f"The engines ({', '.join(self.urls)}) failed {MAX_RESTARTS + 1} times in one step. Look into their "
                f"logs ({self._log_folder} has the logs of engines started here), correct what they name, and resume "
                "the run from its last checkpoint."
            )
        self._restarts += 1
        broken = [self.urls[number] for number in numbers]
        kept = set(self.urls).difference(broken) if self.restartable else ()
        self._use(self.source.restart(broken), kept)

    def stop(self) -> None:
        """Ends the servers that were started here, with all their processes. May be called again."""
        self.source.stop()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _key(rollout: RolloutConfig, rendezvous: Rendezvous | None) -> str:
    """The key that the engines demand.

    Raises:
        UserError: rollout.urls names engines, and the environment has no key for them.
    """
    if rendezvous and rendezvous.engine_nodes:
        return rendezvous.key()
    key = os.environ.get(rollout.api_key_env)
    if rollout.urls and not key:
        raise UserError(
            f"rollout.urls names running engines, but the environment variable "
            f"{rollout.api_key_env} that should hold their key is not set. Set it to the "
            "VLLM_API_KEY they were started with."
        )
    return key or secrets.token_urlsafe(32)
