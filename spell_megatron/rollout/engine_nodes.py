"""Engines on nodes of their own in a cluster's job: the nodes publish their addresses, and the trainer reads them.

Requests to restart engines go the other way. Both are files of the job's rendezvous. Node N publishes `engines-N`,
which holds the number of the last request that it has answered. The trainer publishes `restart-1`, `restart-2`, ...
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from spell_megatron.config.schema import ModelConfig, RolloutConfig
from spell_megatron.errors import ProcessLost, UserError
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.rollout.placement import Device
from spell_megatron.rollout.server import ServerSettings
from spell_megatron.rollout.servers import Servers

_LATER_SECONDS = 60.0  # that a node may start after the trainer


class EngineNodes:
    """The trainer's side: the engines of all engine nodes.

    Args:
        rendezvous: of the job.
        start_timeout: seconds after which a node gives up an engine that does not become ready.
    """

    restartable = True

    def __init__(self, rendezvous: Rendezvous, start_timeout: float) -> None:
        self._rendezvous, self._seconds = rendezvous, start_timeout + _LATER_SECONDS
        self._requests = 0
        self._urls: list[list[str]] = []

    def start(self) -> list[str]:
        """Waits until all nodes have published their engines since the last request; the addresses of all engines."""
        self._urls = [self._published(node) for node in range(self._rendezvous.engine_nodes)]
        return [url for urls in self._urls for url in urls]

    def _published(self, node: int) -> list[str]:
        """The addresses of a node's engines.

        Raises:
            UserError: it does not publish them in time.
        """

        def answers(content: dict) -> bool:
            return content["request"] == self._requests

        return self._rendezvous.wait(f"engines-{node}", self._seconds, answers)["urls"]

    def restart(self, broken: Collection[str]) -> list[str]:
        """Has the nodes restart the engines at these addresses; the addresses of all engines.

        Raises:
            ProcessLost: a node does not answer.
        """
        self._requests += 1
        self._rendezvous.publish(f"restart-{self._requests}", {"urls": list(broken)})
        for node, urls in enumerate(self._urls):
            try:
                self._urls[node] = self._published(node)
            except UserError as error:
                raise ProcessLost(
                    f"Engine node {node} ({', '.join(urls)}) has not answered for {self._seconds:g} s. The node is "
                    "lost, or its process has ended: then its log says why. The run goes on from its last checkpoint."
                ) from error
        return [url for urls in self._urls for url in urls]

    def check(self) -> None:
        """Does nothing: this process started no server."""

    def stop(self) -> None:
        """Does nothing: this process started no server."""


def serve(
    model: ModelConfig,
    rollout: RolloutConfig,
    log_folder: Path,
    rendezvous: Rendezvous,
    node: int,
    *,
    device: Device,
    seed: int,
    routing: bool,
    trainers: int,
) -> None:
    """The node's side: runs its share of the engines until this process is ended.

    Engines that the trainer asks to be restarted are restarted.

    Args:
        model, rollout: sections of the configuration; rollout.replicas are spread over the engine nodes.
        log_folder: where the servers' logs go, as engine-<replica>.log.
        rendezvous: of the job.
        node: number of this node among the engine nodes.
        device, seed: of the section `run`.
        routing: have the engines of a mixture of experts return the experts of each token, where vLLM can.
        trainers: trainer processes that share this node's GPUs.

    Raises:
        UserError: the replicas cannot be spread evenly over the nodes, or as in `Servers`.
    """
    share, rest = divmod(rollout.replicas, rendezvous.engine_nodes)
    if rest:
        raise UserError(
            f"rollout.replicas = {rollout.replicas} engines cannot be spread evenly over "
            f"{rendezvous.engine_nodes} engine nodes. Use a multiple of the number of nodes."
        )
    servers = Servers(
        ServerSettings(model, rollout, seed, routing),
        rendezvous.key(),
        log_folder,
        range(node * share, (node + 1) * share),
        device=device,
        trainers=trainers,
        host=rendezvous.address(),
    )
    try:
        urls, request = servers.start(), 0
        while True:
            rendezvous.publish(f"engines-{node}", {"urls": urls, "request": request})
            print("engines ready at " + ", ".join(urls), flush=True)
            request += 1
            # The trainer decides how often engines may fail.
            urls = servers.restart(rendezvous.wait(f"restart-{request}")["urls"])
    finally:
        servers.stop()
