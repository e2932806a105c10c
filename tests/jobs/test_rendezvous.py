"""Processes of a job find each other by files; addresses come from Slurm."""

import json
import multiprocessing
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from spell_megatron.errors import UserError
from spell_megatron.processes.rendezvous import NODES, Rendezvous

ROOT = Path(__file__).parents[2]


def test_files_are_private_and_arrive_whole(tmp_path):
    meeting = Rendezvous(tmp_path / "job.0")
    meeting.publish("engines-0", {"urls": ["http://127.0.0.1:1"]})
    assert meeting.wait("engines-0", 1) == {"urls": ["http://127.0.0.1:1"]}
    meeting.key()
    files = list(meeting.folder.iterdir())
    assert sorted(file.name for file in files) == ["engines-0", "key"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
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


def test_addresses_are_those_that_slurm_knows(tmp_path, monkeypatch):
    meeting = Rendezvous(tmp_path)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    with pytest.raises(UserError, match="address of the node n2 is unknown: it is not a node of Slurm"):
        meeting.address()
    nodes = tmp_path / NODES
    nodes.write_text("NodeName=n1 Arch=x NodeAddr=10.0.0.1 Port=1\nNodeName=n2 Arch=x NodeAddr=10.0.0.2 Port=1\n")
    assert meeting.address() == "10.0.0.2"
    nodes.write_text("NodeName=n2 Arch=x NodeAddr=no-such-node.invalid Port=1\n")
    with pytest.raises(UserError, match="NodeAddr in `scontrol show node` is 'no-such-node.invalid'.*NodeAddr"):
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
