"""Processes of a job find each other by files; addresses come from Slurm."""

import errno
import functools
import json
import multiprocessing
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest

from spell_megatron import files
from spell_megatron.errors import UserError
from spell_megatron.processes.rendezvous import NODES, Rendezvous, await_settings

ROOT = Path(__file__).parents[2]


def test_files_are_private_and_arrive_whole(tmp_path):
    meeting = Rendezvous(tmp_path / "job.0")
    meeting.publish("engines-0", {"urls": ["http://127.0.0.1:1"]})
    assert meeting.wait("engines-0", 1) == {"urls": ["http://127.0.0.1:1"]}
    meeting.key()
    assert meeting.key() == meeting.key()
    found = [path for path in meeting.folder.iterdir() if path.is_file()]
    assert sorted(file.name for file in found) == ["engines-0", "key"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in found} == {0o600}
    assert stat.S_IMODE(meeting.folder.stat().st_mode) == 0o700


def _key(folder: Path, _: int) -> str:
    return Rendezvous(folder).key()


def test_all_processes_have_one_key(tmp_path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        keys = pool.starmap(_key, [(tmp_path / "job.0", number) for number in range(64)])
    assert len(set(keys)) == 1 and len(keys[0]) > 30


def test_a_process_that_does_not_come_is_named(tmp_path):
    with pytest.raises(UserError, match="engines-0 was not written within 0.3 s.*log"):
        Rendezvous(tmp_path).wait("engines-0", 0.3)


def later(*actions: Callable[[], object]) -> threading.Thread:
    """Another node, which does one thing after the other."""

    def act() -> None:
        for action in actions:
            time.sleep(0.1)
            action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_files_that_are_seen_late_empty_or_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PAUSE", 0.02)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    meeting = Rendezvous(tmp_path)
    nodes = "NodeName=n1 Arch=x NodeAddr=127.0.0.17 Port=1\n"
    for name, whole, halves, ask in (
        ("trainer", '{"port": 12}', ("", '{"port": 1'), lambda: meeting.wait("trainer", 10) == {"port": 12}),
        (NODES, nodes, ("", "NodeName=n1 Arch=x NodeAddr=127.0.0.1"), lambda: meeting.address() == "127.0.0.17"),
        ("key", "secret", ("",), lambda: meeting.key() == "secret"),
    ):
        if name == "key":
            (tmp_path / ".key").mkdir()  # another process makes it
        node = later(*(functools.partial((tmp_path / name).write_text, text) for text in (*halves, whole)))
        assert ask(), name
        node.join()


def test_settings_that_are_seen_late(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PAUSE", 0.02)
    settings = tmp_path / "config.yaml"
    writes = [functools.partial(settings.write_text, text) for text in ("", "run: {na", "run: {name: x}")]
    node = later(*writes)
    await_settings([settings])
    assert settings.read_text() == "run: {name: x}"
    node.join()
    settings.write_text("")
    monkeypatch.setattr(files.when_there, "__defaults__", (0.1,))
    with pytest.raises(UserError, match="does not see the settings of the job.*not complete"):
        await_settings([settings])


def test_filesystems_without_hard_links_and_with_servers_that_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PAUSE", 0.02)
    refused = OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", Mock(side_effect=refused))
    assert Rendezvous(tmp_path / "a").key() == Rendezvous(tmp_path / "a").key()
    stale = OSError(errno.ESTALE, "Stale file handle")
    meeting, replace, read = Rendezvous(tmp_path / "b"), os.replace, Path.read_text
    monkeypatch.setattr(os, "replace", Mock(side_effect=[stale, stale, DEFAULT], wraps=replace))
    meeting.publish("trainer", {"port": 1})
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=[stale, stale, read(tmp_path / "b" / "trainer")]))
    assert meeting.wait("trainer", 10) == {"port": 1}
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=[FileExistsError(errno.EEXIST, "exists"), stale, None]))
    Rendezvous(tmp_path / "c")
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=r"cannot be made \(Permission denied\)"):
        Rendezvous(tmp_path / "d")


def test_addresses_are_those_that_slurm_knows(tmp_path, monkeypatch):
    meeting = Rendezvous(tmp_path)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setattr("spell_megatron.processes.rendezvous.LATE", 0.1)
    with pytest.raises(UserError, match="address of the node n2 is unknown: it is not a node of Slurm"):
        meeting.address()
    nodes = tmp_path / NODES
    nodes.write_text("NodeName=n1 Arch=x NodeAddr=10.0.0.1 Port=1\nNodeName=n2 Arch=x NodeAddr=10.0.0.2 Port=1\n")
    assert meeting.address() == "10.0.0.2"
    nodes.write_text("NodeName=n2 Arch=x NodeAddr=no-such-node.invalid Port=1\n")
    with pytest.raises(UserError, match="NodeAddr in `scontrol show node` is 'no-such-node.invalid'.*NodeAddr"):
        meeting.address()
    nodes.write_text("NodeName=n2 Arch=x NodeAddr=fd00::2 Port=1\n")
    with pytest.raises(UserError, match="n2 has no IPv4 address: its NodeAddr .* 'fd00::2', and .* IPv4"):
        meeting.address()
    # Debian's /etc/hosts: the node's own name is an address of its own, useless to others
    nodes.write_text("NodeName=n1 NodeAddr=10.0.0.1 x\nNodeName=n2 x NodeAddr=localhost x\n")
    with pytest.raises(UserError, match="takes its own name, 'localhost', for 127.*n1.*/etc/hosts"):
        meeting.address()


JOIN = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from spell_megatron.processes.joining import join
from spell_megatron.processes.rendezvous import Rendezvous
join("cpu", Rendezvous(Path(sys.argv[1])))
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(dist.get_rank(), dist.get_world_size(), total.item(), flush=True)
dist.barrier()
"""


def test_trainer_processes_of_several_nodes_meet(slurm, tmp_path):
    """Three processes on three nodes whose names do not resolve."""
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo(slurm.nodes[0], None)
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    (folder / NODES).write_text(slurm.run("scontrol", "-o", "show", "node"))
    python = ("env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", sys.executable)
    output = slurm.run("srun", "--nodes=3", "--ntasks-per-node=1", *python, str(script), str(folder))
    lines = sorted(line for line in output.splitlines() if line[:1].isdigit())
    assert lines == [f"{rank} 3 6.0" for rank in range(3)]
    place = json.loads((folder / "trainer").read_text())
    assert place["address"] == "127.0.0.1" and place["port"] != 29500
    assert os.stat(folder / "trainer").st_uid == os.getuid()
