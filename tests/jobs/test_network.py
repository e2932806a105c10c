"""Jobs on machines with addresses of their own, whose network delays, loses and is cut, and whose files come late."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import late_folder
import network
import psutil
import pytest
import yaml
from mini_slurm import FINISHED, HEAD, MiniSlurm, missing
from network import Network
from small_run import MARK, ROOT, SMALL

from spell_megatron.jobs.job import _MAKE_FOLDER
from spell_megatron.processes.rendezvous import NODES

pytestmark = [pytest.mark.slow, pytest.mark.engine]

MACHINES = 4
HERE = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LATE = 3.0  # seconds
JOIN = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from spell_megatron.processes.collective import from_all
from spell_megatron.processes.joining import join
from spell_megatron.processes.rendezvous import Rendezvous
meeting = Rendezvous(Path(sys.argv[1]))
join("cpu", meeting)
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
key = meeting.key()
assert from_all(key) == [key] * 3
print(dist.get_rank(), dist.get_world_size(), total.item(), key, flush=True)
dist.barrier()
"""
HOLD = """
import sys, time
from pathlib import Path
from spell_megatron.errors import UserError
from spell_megatron.processes import folder_lock
folder_lock.BEAT, folder_lock.SILENT = 0.5, 5.0
try:
    with folder_lock.FolderLock(Path(sys.argv[1]), "`spell train`", ""):
        print("held", flush=True)
        time.sleep(60)
except UserError as error:
    print(error, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def machines():
    if reason := missing() or network.missing() or late_folder.missing():
        pytest.skip(f"no machines: {reason}")
    with Network([HEAD, *(f"n{number + 1}" for number in range(MACHINES))]) as machines:
        yield machines


@pytest.fixture(scope="module")
def slurm(machines, tmp_path_factory):
    with MiniSlurm(tmp_path_factory.mktemp("slurm"), MACHINES, network=machines) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared(machines, tmp_path_factory) -> Path:
    """A folder that each machine sees late. This process sees it as the server does, under its name + "-server"."""
    place = tmp_path_factory.mktemp("late") / "shared"
    server = place.with_name("shared-server")
    for folder in (place, server):
        folder.mkdir()
    for name in machines.addresses:
        late_folder.mount(machines.enter(name), server, place, LATE)
    return place


@pytest.fixture(scope="module")
def submit(slurm, shared, spell_launch, tmp_path_factory):
    """submit(name, *arguments) -> (run folder as the server has it, job id, folder of its logs)."""
    folder = tmp_path_factory.mktemp("cluster")
    activate = folder / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": 1, "SPELL_TEST": MARK}
    settings = {"folder": str(folder), "gpus_per_node": 0, "time": "00:30:00", "env": variables}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(settings | {"venv": str(folder / "venv")}))

    def submit(name: str, *arguments: str) -> tuple[Path, str, Path]:
        where = (f"--run.output_dir={shared}", f"--run.name={name}", "--cluster", folder / "cluster.yaml")
        words = ("--config", "examples/quickstart.yaml", *where, *SMALL, *arguments)
        done = spell_launch(*words, enter=slurm.enter(HEAD), **slurm.environment)
        assert done.returncode == 0, done.stderr
        job = re.search(r"job (\d+)", done.stdout)[1]
        return shared.with_name("shared-server") / name, job, Path(re.search(r"Logs +(\S+)/", done.stdout)[1])

    return submit


def until(holds, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def steps(run: Path) -> list[dict]:
    log = run / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def last_step(run: Path) -> int:
    return steps(run)[-1]["step"] if steps(run) else -1


def ended(slurm: MiniSlurm, job: str) -> bool:
    return slurm.job(job)["JobState"] in FINISHED


def said(logs: Path) -> str:
    return "\n".join(log.read_text() for log in sorted(logs.glob("log-*.out")))


def on(slurm: MiniSlurm, machine: str, code: str, *words: object, **environment: str) -> subprocess.Popen:
    """A Python program on a machine."""
    return subprocess.Popen(
        [*slurm.enter(machine), sys.executable, "-c", code, *map(str, words)],
        env=HERE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> None:
    """Kills a program on a machine."""
    psutil.Process(process.pid).children()[0].kill()
    process.communicate()


def test_trainer_processes_meet(slurm, shared):
    """Their addresses come late, and the key and the place of rank 0 too."""
    folder = shared.with_name("shared-server") / "meeting"
    folder.mkdir()
    (folder / NODES).write_text(slurm.run("scontrol", "-o", "show", "node"))
    nodes = ("n1", "n2", "n3")
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3"}
    ranks = [
        on(slurm, node, JOIN, shared / "meeting", SLURM_PROCID=str(rank), SLURMD_NODENAME=node, **step)
        for rank, node in enumerate(nodes)
    ]
    ends = [process.communicate() for process in ranks]
    words = [output.split() for output, _ in ends]
    assert [said[:3] for said in words] == [[str(rank), "3", "6.0"] for rank in range(3)], ends
    assert len({said[3] for said in words}) == 1
    assert json.loads((folder / "trainer").read_text())["address"] == slurm.address("n1")


def test_a_job_begins_in_a_folder_that_was_just_made_elsewhere(slurm, shared):
    """As `spell launch` does: here it can neither be made nor seen yet."""
    subprocess.run([*slurm.enter(HEAD), "mkdir", shared / "new"], check=True)
    script = f'SPELL_RENDEZVOUS={shared}/new/jobs/1.0\n{_MAKE_FOLDER}\nmkdir "$SPELL_RENDEZVOUS"'
    subprocess.run([*slurm.enter("n1"), "bash", "-c", script], check=True)


def test_a_folder_belongs_to_one_machine(slurm, shared):
    first = on(slurm, "n1", HOLD, shared / "locked", SLURM_JOB_ID="1")
    assert first.stdout.readline() == "held\n"
    for job in ("", "2"):
        _, said = on(slurm, "n2", HOLD, shared / "locked", **({"SLURM_JOB_ID": job} if job else {})).communicate()
        assert "on n1, Slurm job 1, since 20" in said, said
    end(first)
    _, said = on(slurm, "n2", HOLD, shared / "locked").communicate()  # for all it knows, it lives
    assert "on n1, Slurm job 1, since 20" in said, said
    second = on(slurm, "n2", HOLD, shared / "locked", SLURM_JOB_ID="1", SLURM_RESTART_COUNT="1")
    assert second.stdout.readline() == "held\n"
    third = on(slurm, "n3", HOLD, shared / "locked", SLURM_JOB_ID="1", SLURM_RESTART_COUNT="2")
    assert third.stdout.readline() == "held\n"  # though the second lives: its node is lost to Slurm
    _, said = second.communicate()
    assert second.returncode == 2 and "now belongs to another process" in said
    end(third)


def test_a_job_survives_its_network(slurm, machines, shared, submit):
    """Packets are delayed and lost, the nodes of an engine and of a trainer process are cut off for some seconds, the
    run is started a second time in between, and in the end the engine's node is lost for good."""
    slow = {"delay": 0.002, "loss": 0.002}
    for node in slurm.nodes:
        machines.set(node, **slow)
    nodes = ("cluster.engine_nodes=1", "cluster.nodes=3", "--training.parallel.processes=2")
    few = ("--run.steps=40", "--checkpoint.every=2", "--validation.every=0")
    run, job, logs = submit("net", *nodes, *few)

    def goes_on(more: int = 1) -> None:
        first = last_step(run)
        until(lambda: last_step(run) >= first + more or ended(slurm, job), 400)
        assert not ended(slurm, job), said(logs)

    goes_on(2)
    (log,) = logs.glob("log-*engines*.out")
    assert f"engines ready at http://{slurm.address('n3')}:" in log.read_text()
    for node in ("n3", "n2"):
        machines.set(node, cut=True)
        time.sleep(12)  # by now an address that does not answer is told to be out of reach
        machines.set(node, **slow)
        goes_on(2)
    command = [sys.executable, "-m", "spell_megatron", "train", "--resume", str(shared / "net")]
    second = subprocess.run([*slurm.enter("n4"), *command], env=HERE, capture_output=True, text=True)
    assert second.returncode == 2 and f"on n1, Slurm job {job}, since" in second.stderr, second.stderr
    goes_on(1)
    assert slurm.job(job)["Restarts"] == "0" and "Waiting for engines" not in said(logs)
    machines.power_off("n3")
    until(lambda: slurm.job(job)["Restarts"] == "1", 120)
    goes_on(2)
    (run / "stop").touch()
    assert slurm.wait(job, 120)["ExitCode"] == "0:0", said(logs)
    numbers = [row["step"] for row in steps(run)]
    assert numbers == list(range(len(numbers)))
    assert "Traceback" not in said(logs)
