"""How the processes of a job find each other: by small files in one folder of the shared filesystem.

Nothing has a fixed port. Each process that others have to reach listens on a port that its machine gives it, and
then writes down where. The folder belongs to one start of one job (its name holds the job's id and restart
count), so that what an earlier start wrote is never read.

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
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from spell_megatron.errors import UserError
from spell_megatron.files import appearing_file
from spell_megatron.ranks import slurm_node

NODES = "nodes"


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
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(
                f"The folder {folder}, by which the processes of the job find each other, cannot be made "
                f"({error.strerror}). It must be on a filesystem that every node and container of the job sees."
            ) from error

    def publish(self, name: str, content: dict) -> None:
        """Write a file for the others; they see all of it or nothing."""
        with appearing_file(self.folder / name) as partial:
            _write_private(partial, json.dumps(content))

    def wait(self, name: str, seconds: float = math.inf, accept: Callable[[dict], bool] = lambda content: True) -> dict:
        """The content of a file, once another process has written one that `accept` holds for.

        Raises:
            UserError: it is not there after `seconds`.
        """
        path, deadline = self.folder / name, time.monotonic() + seconds
        while True:
            with suppress(FileNotFoundError):
                if accept(content := json.loads(path.read_text(encoding="utf-8"))):
                    return content
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path} was not written within {seconds:g} s. Either the process that should write it failed (its "
                    "log, beside this one, says why), or the folder is not on a filesystem that all nodes of the job "
                    "share."
                )
            # A networked filesystem may remember that a file is not there; listing its folder makes it look again.
            os.listdir(self.folder)
            time.sleep(0.2)

    def key(self) -> str:
        """The API key of the job's engines: made by the first process that asks, and the same for all."""
        path = self.folder / "key"
        if not path.exists():
            temporary = self.folder / f".key.{socket.gethostname()}.{os.getpid()}"
            _write_private(temporary, secrets.token_urlsafe(32))
            with suppress(FileExistsError):  # unlike a rename, a link leaves the file of another as it is
                os.link(temporary, path)
            temporary.unlink()
        return path.read_text(encoding="utf-8")

    def address(self) -> str:
        """IPv4 address of this node, as the other nodes of the job know it.

        From `nodes` (NodeAddr), or, without Slurm, what this machine's name resolves to.

        Raises:
            UserError: the name does not resolve, or only to an address that the others cannot reach.
        """
        name = slurm_node() or socket.gethostname()
        nodes = self._nodes()
        address = nodes.get(name, name)
        try:
            found = str(socket.getaddrinfo(address, None, family=socket.AF_INET)[0][4][0])
        except socket.gaierror as error:
            where = "it is not a node of Slurm"
            if name in nodes:
                where = f"its NodeAddr in `scontrol show node` is {address!r}"
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

    def _nodes(self) -> dict[str, str]:
        with suppress(FileNotFoundError):
            text = (self.folder / NODES).read_text(encoding="utf-8")
            return dict(re.findall(r"NodeName=(\S+) .*?NodeAddr=(\S+)", text))
        return {}


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
