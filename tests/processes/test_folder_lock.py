"""One process at a time in a folder: on one machine, on several whose clocks are apart, and after every kind of end."""

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from spell_megatron.errors import UserError
from spell_megatron.processes import folder_lock
from spell_megatron.processes.folder_lock import FolderLock
from spell_megatron.processes.holder import Holder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from spell_megatron.processes import folder_lock
folder_lock.BEAT = 0.05
with folder_lock.FolderLock(Path(sys.argv[1]), "`spell train`", "Wait."):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder, "`spell train`", "Wait for it.")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def holder(folder: Path, **environment: str):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    """Minutes become tenths of a second."""
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "SILENT", 1.0)
    monkeypatch.setattr(folder_lock, "_PAUSE", 0.02)


def elsewhere(folder: Path, age: float, **fields: object) -> Path:
    """The lock of a process on another machine, which gave its last sign of life some seconds ago."""
    other = dataclasses.replace(Holder.this_process("`spell train`"), host="n7", pid=1, machine="another", **fields)
    path = folder / "lock-1"
    path.write_text(json.dumps(dataclasses.asdict(other)))
    os.utime(path, (time.time() - age,) * 2)
    return path


@contextmanager
def touched(path: Path, clock: float):
    """The holder is alive, and the filesystem has the times of its clock, which is wrong by some seconds."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.02):
            os.utime(path, (time.time() + clock,) * 2)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_a_second_process_is_told_who_works_there(tmp_path):
    with holder(tmp_path, SLURM_JOB_ID="4711") as first:
        with pytest.raises(UserError) as refused, lock(tmp_path):
            pass
        for part in ("`spell train`", f"process {first.pid} on", "Slurm job 4711", "since 20", "Wait for it."):
            assert part in str(refused.value)
        first.send_signal(signal.SIGKILL)
        first.wait()
        with lock(tmp_path):  # at once
            assert files(tmp_path) == ["lock-1", "lock-2"]
    assert files(tmp_path) == []


def test_a_process_has_a_folder_once(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="is in use by"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_requests_to_stop_are_not_for_its_thread(tmp_path):
    """They would wait there for the main thread, which may be in a library for long."""
    with lock(tmp_path):
        (thread,) = (one for one in threading.enumerate() if one.name == "lock")
        deadline = time.monotonic() + 10
        while True:
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            blocked = int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16)
            if all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
                break
            assert time.monotonic() < deadline


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for place in ("/proc/x", "/proc", tmp_path / "file"):
        with pytest.raises(UserError, match=f"Cannot write {place}: "), lock(Path(place)):
            pass


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    of_before = dataclasses.replace(Holder.this_process("x"), started="1")
    (tmp_path / "lock-1").write_text(json.dumps(dataclasses.asdict(of_before)))
    with lock(tmp_path):
        pass


def test_a_process_of_another_machine(tmp_path, impatient):
    elsewhere(tmp_path, age=0)
    with pytest.raises(UserError, match="process 1 on n7"), lock(tmp_path):
        pass
    elsewhere(tmp_path, age=folder_lock.APART + 1)
    with lock(tmp_path):
        pass
    for age in (100, -3600):  # of such an age alone, clocks that are apart may be the cause
        elsewhere(tmp_path, age=age)
        with lock(tmp_path):
            pass


@pytest.mark.parametrize("clock", [-300, 300])
def test_a_live_process_whose_clock_is_wrong(tmp_path, impatient, monkeypatch, clock):
    for job in ("", "5"):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        path = elsewhere(tmp_path, age=-clock)
        with touched(path, clock), pytest.raises(UserError, match="on n7"), lock(tmp_path):
            pass


@pytest.mark.parametrize("clock", [-300, 0, 300])
def test_a_job_waits_until_it_is_known(tmp_path, impatient, monkeypatch, capsys, clock):
    """The holder died with its machine a moment ago."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    elsewhere(tmp_path, age=-clock)
    with lock(tmp_path):
        assert "to see whether" in capsys.readouterr().err


def test_a_folder_is_taken_from_an_earlier_start_of_the_job(tmp_path, impatient, monkeypatch):
    """Its node is lost to Slurm, and goes on working."""
    with holder(tmp_path, SLURM_JOB_ID="5") as first:
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with lock(tmp_path):
            assert files(tmp_path) == ["lock-2"]
            _, said = first.communicate()
            assert first.returncode == 2 and "now belongs to another process" in said and "Traceback" not in said
    assert files(tmp_path) == []


def test_a_process_that_was_suspended_for_long_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("spell_megatron.processes.holder._machine", lambda: "another")
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        os.utime(tmp_path / "lock-1", (time.time() - 3600,) * 2)
        with lock(tmp_path):
            first.send_signal(signal.SIGCONT)
            _, said = first.communicate()
            assert first.returncode == 2 and f"process {os.getpid()} on" in said
            assert files(tmp_path) == ["lock-2"]


def test_a_lock_that_was_removed_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.02)
    with lock(tmp_path):
        (tmp_path / "lock-1").unlink()
        deadline = time.monotonic() + 10
        while not (tmp_path / "lock-1").exists():
            assert time.monotonic() < deadline
    assert files(tmp_path) == []


def test_a_lock_that_was_removed_by_hand_and_taken_by_another(tmp_path):
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        (tmp_path / "lock-1").unlink()
        with lock(tmp_path):
            first.send_signal(signal.SIGCONT)
            _, said = first.communicate()
            assert first.returncode == 2 and f"process {os.getpid()} on" in said
            assert files(tmp_path) == ["lock-1"]


def test_a_lock_that_is_not_complete(tmp_path, impatient):
    """Its process died while it wrote it, or another node does not see all of it yet."""
    (tmp_path / "lock-1").touch()
    with pytest.raises(UserError, match="an unknown host"), lock(tmp_path):
        pass
    threading.Timer(0.05, elsewhere, (tmp_path, 0)).start()
    with pytest.raises(UserError, match="n7"), lock(tmp_path):
        pass
    (tmp_path / "lock-1").write_text('{"pi')
    os.utime(tmp_path / "lock-1", (0, 0))
    with lock(tmp_path):
        pass


def test_others_that_begin_anew_while_a_dead_lock_is_replaced(tmp_path, monkeypatch):
    """One has replaced it, and has ended; another has begun with the number that the dead one had."""
    elsewhere(tmp_path, age=folder_lock.APART + 1)
    make = FolderLock._make

    def later(self: FolderLock, number: int) -> bool:
        elsewhere(tmp_path, age=0, since=1e6)
        return make(self, number)

    monkeypatch.setattr(FolderLock, "_make", later)
    with pytest.raises(UserError, match="on n7, since 1970"), lock(tmp_path):
        pass
    assert files(tmp_path) == ["lock-1"]


def test_a_filesystem_that_lets_set_no_times(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.02)
    with lock(tmp_path):
        path = tmp_path / "lock-1"
        os.utime(path, (0, 0))
        monkeypatch.setattr(os, "utime", Mock(side_effect=OSError(errno.ENOSYS, "not implemented")))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 1:
            assert time.monotonic() < deadline
        assert folder_lock.read_holder(path).pid == os.getpid()


def _race(folder: Path, start, results, ended) -> None:
    start.wait()
    try:
        with lock(folder):
            results.put("held")
            ended.wait()
    except UserError:
        results.put("refused")


def test_one_of_many_gets_the_folder_of_a_dead_process(tmp_path):
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if attempt:
            elsewhere(folder, age=folder_lock.APART + 1)
        start, results, ended = fork.Barrier(12), fork.Queue(), fork.Event()
        processes = [fork.Process(target=_race, args=(folder, start, results, ended)) for _ in range(12)]
        for process in processes:
            process.start()
        assert sorted(results.get(timeout=60) for _ in processes) == ["held"] + ["refused"] * 11
        ended.set()
        for process in processes:
            process.join()
        assert files(folder) == []
