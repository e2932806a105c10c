"""The process of the director, without engines; rollouts in it are tested in tests/test_train.py."""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from small_run import ROOT

from spell_megatron.config.reading import load_config
from spell_megatron.director import messages, remote
from spell_megatron.director.messages import FromDirector, Progress, RolledOut, ToDirector
from spell_megatron.director.process import Service, _ToRank0
from spell_megatron.director.remote import RemoteDirector, _log
from spell_megatron.errors import ProcessLost, UserError
from spell_megatron.monitoring.run_log import log_file, logged_by, run_log
from spell_megatron.processes.channel import Channel
from spell_megatron.processes.signals import REQUESTS


@pytest.fixture
def config(monkeypatch):
    """With a rule check, a reward and a task of the user's own, which that process finds."""
    monkeypatch.chdir(ROOT)
    return load_config(["examples/quickstart.yaml", "examples/extend/extend.yaml"])


@pytest.fixture
def engines():
    """An engine that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield SimpleNamespace(urls=[f"http://127.0.0.1:{server.getsockname()[1]}"], api_key="key", check=lambda: None)


def libraries(pid):
    return {row.path for row in psutil.Process(pid).memory_maps()}


def test_work_is_given_up_and_the_end_of_the_process_is_told(config, engines, tmp_path, caplog):
    """No torch there; requests to stop are rank 0's; what is logged there is in the log of the run."""
    stopped = []
    with RemoteDirector(config, tmp_path, lambda: bool(stopped) or None) as director, caplog.at_level(logging.INFO):
        director.connect(engines, list, None)
        assert director.held_out_questions == 500
        before = director.state_dict()
        assert before["sampler"]["seed"] == config.run.seed
        loaded = libraries(director.process.pid)
        assert any("tokenizers" in path for path in loaded) and not any("torch" in path for path in loaded)

        for number in REQUESTS:  # of Slurm, to every process of a step
            os.kill(director.process.pid, number)
        stopped.append("stop")
        worked = []
        assert director.roll_out(1, "0", lambda mixed: None, meanwhile=lambda: worked.append(1)) is None
        assert not worked  # nothing begins in a rollout that is given up at once
        assert director.validate(lambda done: None) == {}
        assert director.state_dict() == before
        assert not (tmp_path / "rollouts").exists()

        with socket.create_server(("127.0.0.1", 0)) as gone:
            engines.urls = [f"http://127.0.0.1:{gone.getsockname()[1]}"]
        stopped = caplog.records  # a client warns of an engine that fails before it tries again
        assert director.roll_out(1, "0", lambda mixed: None) is None
        warning = stopped[0]
        assert (warning.name, warning.levelname) == ("spell_megatron.rollout.client", "WARNING")
        assert f"the engine at {engines.urls[0]} fails" in warning.getMessage()

        stopped = []
        director.process.kill()
        with pytest.raises(ProcessLost, match=r"killed by signal 9.*train\.log.*Resume"):
            director.roll_out(1, "0", lambda mixed: None)
    assert director.process.returncode == -signal.SIGKILL


def test_the_progress_of_a_rollout_shows_while_the_trainer_works(config, engines, tmp_path, monkeypatch):
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(remote.socket, "socketpair", lambda: (ours, theirs.dup()))
    monkeypatch.setattr(remote.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda timeout: 0))
    channel, shown = Channel(theirs, ToDirector), queue.SimpleQueue()

    def update():
        channel.send(Progress(3))
        assert shown.get(timeout=60) == 3
        channel.send(RolledOut([], {}, 0.0))

    with RemoteDirector(config, tmp_path) as director, theirs:
        director._engines = engines
        assert director.roll_out(1, "0", shown.put, meanwhile=update).rows == []


def test_one_that_does_not_give_up_is_ended(config, engines, tmp_path, monkeypatch, capfd):
    """A function of the user's own may never return. What the process is doing is shown."""
    monkeypatch.setattr(remote, "_GIVE_UP_SECONDS", 1.0)
    monkeypatch.setattr(remote, "_SHOW_SECONDS", 0.1)
    with RemoteDirector(config, tmp_path, lambda: True) as director:
        director.connect(engines, list, None)
        director.process.send_signal(messages.SHOW_STACKS)
        assert director.state_dict()  # it goes on
        assert "director/process.py" in capfd.readouterr().err
        director.process.send_signal(signal.SIGSTOP)
        with pytest.raises(ProcessLost, match=r"had not in 1 s.*function of your own.*Resume"):
            director.roll_out(1, "0", lambda mixed: None)
    assert director.process.returncode == -signal.SIGKILL


def test_what_ends_the_thread_that_reads_is_told(config, engines, tmp_path, monkeypatch):
    def receive(channel):
        raise MemoryError("no room for a message")

    monkeypatch.setattr(Channel, "receive", receive)
    with (
        RemoteDirector(config, tmp_path, lambda: None) as director,
        pytest.raises(MemoryError, match="no room for a message"),
    ):
        director.connect(engines, list, None)


def test_it_ends_when_it_cannot_read_what_rank_0_sends(monkeypatch):
    """Rank 0 would wait for its answer for ever."""
    shown = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda error: shown.put(str(error.exc_value)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        service = threading.Thread(target=Service(Channel(theirs, messages.ToDirector)).run, daemon=True)
        service.start()
        Channel(ours, messages.FromDirector).send(messages.Connected())  # no message for it
        assert "Connected" in shown.get(timeout=60)
        service.join(60)
        assert not service.is_alive()


def test_stack_traces_of_it_are_in_the_log_and_not_on_the_screen(tmp_path, capsys):
    ours, theirs = socket.socketpair()
    logger = logging.getLogger("spell_megatron.selfplay.roles")
    with ours, theirs, logged_by(_ToRank0(Channel(theirs, FromDirector)), "info"):
        try:
            raise ValueError("its cause, \ud83d")  # half a surrogate pair, as JSON of a policy can hold
        except ValueError:
            logger.exception("cluster %s failed", "c-1")
        message, _ = Channel(ours, FromDirector).receive()
    with run_log(tmp_path, 0, "info"):
        _log(message)
    log = log_file(tmp_path, 0).read_text()
    assert "ERROR spell_megatron.selfplay.roles: cluster c-1 failed\nTraceback" in log and r"its cause, \ud83d" in log
    assert capsys.readouterr().err == "spell_megatron.selfplay.roles: cluster c-1 failed (logs/train.log has more)\n"


@pytest.mark.parametrize(
    ("section", "setting", "value"), [("data", "documents", "missing.jsonl"), ("selfplay", "rule", "missing:score")]
)
def test_faults_reach_the_user_in_their_own_words(config, engines, tmp_path, section, setting, value):
    setattr(getattr(config, section), setting, value)
    with RemoteDirector(config, tmp_path) as director, pytest.raises(UserError, match="There is no|missing.jsonl"):
        director.connect(engines, list, None)
    assert director.process.returncode == 0


def test_it_ends_with_rank_0(config, tmp_path):
    """Killed, rank 0 cannot end it."""
    code = (
        "import sys, time; from pathlib import Path; from spell_megatron.config.reading import load_config\n"
        "from spell_megatron.director.remote import RemoteDirector\n"
        f"one = RemoteDirector(load_config('examples/quickstart.yaml', []), Path({str(tmp_path)!r}))\n"
        "print(one.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as rank_0:
        pid = int(rank_0.stdout.readline())
        assert psutil.pid_exists(pid)
        rank_0.kill()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
