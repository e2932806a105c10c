"""How the processes of a job find each other: by small files in one folder of the shared filesystem.

Nothing has a fixed port. Each process that others have to reach listens on a port that its machine gives it, and
then writes down where. The folder belongs to one start of one job (its name holds the job's id and restart
count), so that what an earlier start wrote is never read.

Nodes may see the folder late, and not all at the same time. A file appears whole, by a rename; no hard links and no
locks are needed.

The job script writes `nodes`, what `scontrol show node` says of the job's nodes, for a node's name need not
resolve on the others, and inside a container there is no scontrol.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import yaml

from spell_megatron.errors import UserError
from spell_megatron.files import LATE, appearing_file, make_folder, when_there
from spell_megatron.ranks import slurm_node

NODES = "nodes"
BEGUN = "begun"
"""Published by rank 0 when it has the run's folder for itself; before that no process of the job may write there."""
ENDED = "ended"
"""Made by the job's script when the trainer has ended."""


class Rendezvous:
    """One folder by which the processes of a job meet.

    Args:
        folder: on a filesystem that all of them see; made if it is not there.
        engine_nodes: number of processes that publish engines in it; 0: the trainer starts its engines itself.
    """

    def __init__(self, folder: Path, engine_nodes: int = 0) -> None:
        self.folder = folder.absolute()
        self.engine_nodes = engine_nodes
        try:
            make_folder(self.folder, 0o700)
        except OSError as error:
            raise UserError(
                f"The folder {folder}, by which the processes of the job find each other, cannot be made "
                f"({error.strerror or error}). It must be on a filesystem that every node and container of the job "
                "sees."
            ) from error

    def publish(self, name: str, content: dict) -> None:
        """Write a file for the others; they see all of it or nothing.

        Raises:
            UserError: it cannot be written.
        """
        self._write(name, json.dumps(content))

    def _write(self, name: str, text: str) -> None:
        def write(path: Path) -> bool:
            with appearing_file(path) as partial:
                _write_private(partial, text)
            return True

        path = self.folder / name
        try:
            when_there(path, write)  # a server that fails may be back soon
        except TimeoutError as error:
            raise UserError(
                f"{path}, by which the processes of the job find each other, cannot be written: {error}. The folder of "
                "the run must be on a filesystem that all nodes of the job can write."
            ) from error

    def wait(self, name: str, seconds: float = math.inf, accept: Callable[[dict], bool] = lambda content: True) -> dict:
        """The content of a file, once another process has written one that `accept` holds for.

        Raises:
            UserError: it is not there after `seconds`.
        """

        def read(path: Path) -> dict | None:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) and accept(content) else None

        path = self.folder / name
        try:
            return when_there(path, read, seconds)
        except TimeoutError as error:
            raise UserError(
                f"{path} was not written within {seconds:g} s. Either the process that should write it failed (its "
                "log, beside this one, says why), or the folder is not on a filesystem that all nodes of the job "
                "share."
            ) from error

    def key(self) -> str:
        """The API key of the job's engines: made by the first process that asks, and the same for all."""
        path = self.folder / "key"
        if not path.exists() and self._first("key"):
            self._write("key", secrets.token_urlsafe(32))
        try:
            return when_there(path, lambda path: path.read_text(encoding="utf-8") or None)
        except TimeoutError as error:
            raise UserError(
                f"The key of the job's engines, {path}, cannot be read ({error}). The process that should write it "
                "failed (its log, beside this one, says why), or the nodes of the job do not share the folder."
            ) from error

    def _first(self, name: str) -> bool:
        """Whether this process is the first that asks for this name; to make a folder is atomic everywhere."""
        try:
            (self.folder / f".{name}").mkdir()
            return True
        except OSError:  # it exists; or nothing can be written here, which whoever waits for the first is told
            return False

    def address(self) -> str:
        """IPv4 address of this node, as the other nodes of the job know it.

        From `nodes` (NodeAddr), or, without Slurm, what this machine's name resolves to.

        Raises:
            UserError: the name does not resolve, or only to an address that the others cannot reach.
        """
        name = slurm_node() or socket.gethostname()
        nodes = self._nodes(name)
        address = nodes.get(name, name)
        try:
            found = str(socket.getaddrinfo(address, None, family=socket.AF_INET)[0][4][0])
        except socket.gaierror as error:
            where = "it is not a node of Slurm"
            if name in nodes:
                where = f"its NodeAddr in `scontrol show node` is {address!r}"
            if _is_ipv6(address):
                raise UserError(
                    f"The node {name} has no IPv4 address: {where}, and the processes of a run connect by IPv4. Ask "
                    "the administrators to set NodeAddr in slurm.conf to an IPv4 address, or to a name that has one."
                ) from error
            raise UserError(
                f"The address of the node {name} is unknown: {where}, and that name does not resolve on the node "
                f"itself ({error.strerror}). Ask the administrators to enter it in DNS or /etc/hosts, or to set "
                "NodeAddr in slurm.conf to an IP address."
            ) from error
        others = [other for other, theirs in nodes.items() if other != name and theirs != address]
        if found.startswith("127.") and others:
            raise UserError(
                f"The node {name} takes its own name, {address!r}, for {found}, and other nodes of the job "
                f"({', '.join(others[:3])}) cannot reach that address. Correct the node's /etc/hosts "
                "(Debian and Ubuntu write a line 127.0.1.1 there), or have NodeAddr set to an IP address in slurm.conf."
            )
        return found

    def _nodes(self, name: str) -> dict[str, str]:
        """The addresses of the job's nodes by their names; none if the file does not come to know this node."""

        def read(path: Path) -> dict[str, str] | None:
            # What follows an address shows that all of the address is there.
            nodes = dict(re.findall(r"NodeName=(\S+) .*?NodeAddr=(\S+)\s", path.read_text(encoding="utf-8")))
            return nodes if name in nodes else None

        try:
            return when_there(self.folder / NODES, read, LATE if slurm_node() else 0.0)
        except TimeoutError:
            return {}


def await_settings(files: Iterable[Path]) -> None:
    """Wait until this node sees the settings of its job, which another node has just written.

    Raises:
        UserError: it does not see them.
    """
    for file in files:
        try:
            when_there(file, _settings)
        except TimeoutError as error:
            raise UserError(
                f"This node does not see the settings of the job, {file} ({error}). The run's folder must be on a "
                "filesystem that all nodes of the job share."
            ) from error


def _settings(file: Path) -> dict | None:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"it is not complete: {error}") from error
    return content if isinstance(content, dict) else None


def _is_ipv6(address: str) -> bool:
    """Whether it is, or is the name of, an IPv6 address alone."""
    with suppress(OSError):
        return bool(socket.getaddrinfo(address, None, family=socket.AF_INET6))
    return False


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
