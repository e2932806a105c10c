"""What a run tells of itself, and how it is asked to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from spell_megatron.errors import UserError
from spell_megatron.files import write_text
from spell_megatron.monitoring import status
from spell_megatron.monitoring.describe import describe, numbers
from spell_megatron.monitoring.progress import Progress
from spell_megatron.monitoring.queue import Job
from spell_megatron.monitoring.status import Status
from spell_megatron.monitoring.stop_run import stop
from spell_megatron.monitoring.stopping import Reason, Stopped, StopRequest
from spell_megatron.processes import folder_lock


def test_a_run_tells_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "INTERVAL", 0.05)
    (tmp_path / "stop").touch()  # of an earlier start
    rows = '{"step": 0}\n{"step": 1, "time/step": 90.0, "selfplay/reward": 0.25, "train/skipped": 1.0}\n{"st'
    (tmp_path / "metrics.jsonl").write_text(rows)
    with Status(tmp_path, steps=11) as own:
        assert not (tmp_path / "stop").exists()
        own.watch(lambda: [{"url": "http://n1:1", "healthy": False}])
        own.update(state="running", step=2)
        with Progress(enabled=False, status=own).stage("rollout", 6) as advance:
            advance(4)
            deadline = time.monotonic() + 10
            while not (told := status.read(tmp_path)).get("engines"):
                assert time.monotonic() < deadline
            text = "\n".join(describe(tmp_path, told))
            said = json.loads(json.dumps(numbers(tmp_path, told, Job("7", "RUNNING", 0))))
    assert (said["state"], said["step"], said["done"], said["silent"]) == ("running", 2, 4, 0)
    assert said["metrics"]["selfplay/reward"] == 0.25 and said["queue"]["number"] == "7" and said["checkpoint"] is None
    for part in (
        ": running\n",
        "1/11, 90 s per step, 15 min to go",
        "rollout 4/6, for ",
        "reward 0.250, no update: the gradient",
    ):
        assert part in text, text
    for part in (f"process {os.getpid()} on", "http://n1:1 does not answer", "none yet"):
        assert part in text, text
    assert not status.silent(told)
    assert status.silent(told | {"time": time.time() - 100}) >= 100


def test_a_failure_is_told(tmp_path):
    with pytest.raises(UserError), Status(tmp_path, steps=1):
        raise UserError("the dog ate it")
    told = status.read(tmp_path)
    assert told["state"] == "failed" and status.ended(told)
    assert "the dog ate it" in "\n".join(describe(tmp_path, told))
    with pytest.raises(UserError, match="has ended already: it is failed"):
        stop(tmp_path)


def test_a_job_that_waits_in_the_queue_is_told(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "submitted").write_text("7")
    told = status.read(tmp_path)
    assert describe(tmp_path, told, Job("7", "PENDING", 0)) == [f"{tmp_path}: waits in the queue (job 7)"]
    assert describe(tmp_path, told, None) == [f"{tmp_path}: submitted; it has not started yet"]
    with Status(tmp_path, steps=1) as own:
        own.update(state="stopped")
    first, *_ = describe(tmp_path, status.read(tmp_path), Job("7", "PENDING", 1))
    assert first == f"{tmp_path}: waits in the queue (job 7); before that it was stopped"


def test_a_folder_without_a_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        status.read(tmp_path / "file")
    with pytest.raises(UserError, match="has no status.json"):
        status.read(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        status.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"state": "runn', b"[]", b"{}", b"null", b'{"state": 3, "time": "x"}', b"\xff\xfe", bytes(99)],
)
def test_a_damaged_status(tmp_path, content):
    """A machine that fails can leave an empty file or a part."""
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(UserError, match=r"status.json cannot be read .*--resume"):
        status.read(tmp_path)
    with Status(tmp_path, steps=1):  # the next start does not mind
        assert status.read(tmp_path)["steps"] == 1
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    with pytest.raises(UserError, match="status.json cannot be read"):
        status.read(tmp_path)


@pytest.mark.parametrize("clock", [-3600, 3600])
def test_a_run_on_a_machine_whose_clock_is_wrong(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    with Status(tmp_path, steps=1):
        about = json.loads((tmp_path / "status.json").read_text()) | {"host": "n7"}
    path, ended = tmp_path / "status.json", threading.Event()

    def beat() -> None:
        times = dict.fromkeys(("time", "started", "stage_since"), time.time() + clock)
        write_text(path, json.dumps(about | times | {"state": "running"}))

    def run() -> None:
        while not ended.wait(0.02):
            beat()

    beat()
    thread = threading.Thread(target=run)
    thread.start()
    told = status.read(tmp_path)
    ended.set()
    thread.join()
    assert not status.silent(told)
    assert all(abs(told[name] - time.time()) < 30 for name in ("time", "started", "stage_since"))
    os.utime(path, (time.time() - 90,) * 2)  # it died
    assert status.silent(status.read(tmp_path)) >= 89


def test_a_request_to_stop_by_file(tmp_path):
    with StopRequest(tmp_path) as request:
        assert request.reason() is None
        (tmp_path / "stop").touch()
        assert request.reason() == "stop"


# A process as a run is, with a helper that knows nothing of signals. All get the signals of argv, as from Slurm or a
# terminal; then it says why it is to stop, and how the helper ended.
CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from spell_megatron.monitoring.stopping import Stopped, StopRequest
from spell_megatron.processes.signals import expect_requests
ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
expect_requests()
try:
    with StopRequest(Path(sys.argv[1])) as request:
        request.can_save = sys.argv[2] == "can"
        helper = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in map(int, sys.argv[3:]):
            os.kill(helper.pid, number)
            os.kill(os.getpid(), number)
            while number in signal.sigpending() and not ignored:
                time.sleep(0.01)
            request.wait(60)
            request._at -= 10
        if sys.argv[3:] == ["2", "2"]:
            time.sleep(60)
        print(request.reason(), helper.poll())
except Stopped as stopped:
    print("at once:", stopped.reason)
finally:
    helper.kill()
"""
USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("can_save", "signals", "code", "said"),
    [
        ("can", [USR1, USR1], 0, "requeue None\n"),
        ("can", [TERM, TERM], 0, "terminate None\n"),  # Slurm sends another one when the time to save is over
        ("can", [USR1, TERM], 0, "requeue None\n"),
        ("can", [INT], 0, "interrupt None\n"),
        ("can", [INT, INT], 130, ""),
        ("cannot", [USR1], 0, "at once: requeue\n"),
        ("cannot", [TERM], 0, "at once: terminate\n"),
        ("cannot", [INT], 0, "at once: interrupt\n"),
    ],
)
def test_signals(tmp_path, can_save, signals, code, said):
    arguments = [str(tmp_path), can_save, *(str(int(number)) for number in signals)]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, said), done.stderr


def test_a_shell_may_keep_ctrl_c_from_what_it_starts_in_the_background(tmp_path):
    command = [sys.executable, "-c", CHILD.replace("request.wait(60)", "pass"), str(tmp_path), "can", "2"]
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=ignore)
    assert (done.returncode, done.stdout) == (0, "None None\n"), done.stderr


def test_a_start_that_is_stopped_has_not_failed(tmp_path):
    with pytest.raises(Stopped), Status(tmp_path, steps=1):
        raise Stopped(Reason.TERMINATE)
    assert status.read(tmp_path)["state"] == "stopped"


def test_what_the_job_was_asked_for_stays_when_it_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / "stop").touch()
    with Status(tmp_path, steps=1):
        assert (tmp_path / "stop").exists()


def test_the_file_is_never_half_written(tmp_path):
    with Status(tmp_path, steps=3) as own:
        for step in range(300):
            own.update(step=step)
            assert json.loads((tmp_path / "status.json").read_text())["step"] == step
