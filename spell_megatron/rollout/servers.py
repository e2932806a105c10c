"""The servers that this process starts on its machine."""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from spell_megatron.errors import UserError
from spell_megatron.files import make_folder
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.placement import Device, place
from spell_megatron.rollout.server import (
    Server,
    ServerSettings,
    held_port,
    server_command,
    server_environment,
)

_STOP_SECONDS = 15.0


class Servers:
    """Some of a run's replicas, on GPUs that the trainer leaves free or shares. They end with this process.

    Args:
        settings: of every server.
        api_key: key that the servers demand.
        log_folder: where their logs go, as engine-<replica>.log.
        replicas: numbers of the replicas to start.
        device: where the run's processes run (run.device).
        trainers: trainer processes that need GPUs of this machine.
        host: address of this machine at which the servers listen.

    Raises:
        UserError: there are not enough GPUs.
    """

    restartable = True

    def __init__(
        self,
        settings: ServerSettings,
        api_key: str,
        log_folder: Path,
        replicas: range,
        *,
        device: Device,
        trainers: int,
        host: str = "127.0.0.1",
    ) -> None:
        self._settings, self._api_key, self._log_folder = settings, api_key, log_folder
        self._replicas, self._host = replicas, host
        rollout = settings.rollout
        self._gpus, self._transport = place(len(replicas), rollout.tensor_parallel, device, trainers, rollout.colocated)
        self.servers: dict[int, Server] = {}
        atexit.register(self.stop)

    def start(self) -> list[str]:
        """Starts all servers and waits until they are ready; returns their addresses.

        Raises:
            UserError: a port is taken, or a server ends or is not ready in rollout.start_timeout seconds.
        """
        make_folder(self._log_folder)
        return self._start(range(len(self._replicas)))

    def restart(self, broken: Collection[str]) -> list[str]:
        """Starts new servers in place of those at these addresses, as `start` does; the addresses of all servers.

        The new servers have other addresses and the weights of the model folder.
        """
        numbers = [number for number, server in self.servers.items() if server.url in broken]
        for number in numbers:
            self.servers[number].process.kill()
            self.servers[number].stop(time.monotonic())
        return self._start(numbers)

    def _start(self, numbers: Sequence[int]) -> list[str]:
        rollout = self._settings.rollout
        with contextlib.ExitStack() as stack:
            for number in numbers:
                replica = self._replicas[number]
                wanted = 0 if rollout.base_port is None else rollout.base_port + number
                port = stack.enter_context(held_port(self._host, wanted, replica))
                self.servers[number] = Server(
                    f"http://{self._host}:{port}",
                    server_command(self._settings, self._transport, port, self._host),
                    server_environment(self._transport, rollout, self._gpus[number], self._api_key),
                    self._log_folder / f"engine-{replica}.log",
                )
            self._wait_until_ready(numbers)
        return [server.url for server in self.servers.values()]

    def _wait_until_ready(self, numbers: Sequence[int]) -> None:
        seconds = self._settings.rollout.start_timeout
        deadline = time.monotonic() + seconds
        for number in numbers:
            server = self.servers[number]
            engine = Engine(server.url, self._api_key)
            while not engine.healthy():
                self._check(numbers)
                if time.monotonic() > deadline:
                    raise UserError(
                        f"An engine was not ready after {seconds:g} s. Its log, {server.log}, ends with: "
                        f"{server.last_words()}. Give it more time with rollout.start_timeout, or see "
                        "in the log what it waits for."
                    )
                time.sleep(0.25)

    def check(self) -> None:
        """Raises UserError if a server has ended."""
        self._check(self.servers)

    def _check(self, numbers: Collection[int]) -> None:
        for server in (self.servers[number] for number in numbers):
            status = server.process.poll()
            if status is None:
                continue
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise UserError(
                f"An engine (vLLM server, process {server.process.pid}) {how}. Its log ends with: "
                f"{server.last_words()}. The whole log is {server.log}; correct what it names "
                "(memory, rollout.extra_args, the model folder) and start the run again."
            )

    def stop(self) -> None:
        """Ends the servers with all their processes. May be called again."""
        for server in self.servers.values():
            server.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for server in self.servers.values():
            server.stop(deadline)
        self.servers.clear()
        atexit.unregister(self.stop)
