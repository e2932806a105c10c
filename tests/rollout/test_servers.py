"""Servers of this machine: a port that is taken, deaths at the start and later."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from engine_fixtures import engine_config, open_engines

from spell_megatron.errors import UserError


def test_port_in_use(policy, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} .*base_port"):
            open_engines(engine_config(policy("dense"), base_port=port), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # test_train sees the same from outside
def test_an_engine_that_dies_at_start_is_quoted(policy, tmp_path: Path):
    broken = shutil.copytree(policy("dense"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError) as caught:
        open_engines(engine_config(broken), tmp_path / "logs")
    message = str(caught.value)
    assert "ended with status" in message and "\n" not in message
    assert "incomplete metadata" in message.lower() or "safetensor" in message.lower()
    assert str(tmp_path / "logs" / "engine-0.log") in message


@pytest.mark.slow
def test_a_server_that_dies_later_is_noticed(policy, tmp_path: Path):
    with open_engines(engine_config(policy("dense")), tmp_path) as engines:
        engines.check()
        family = psutil.Process(engines.source.servers[0].process.pid).children(recursive=True)
        os.killpg(engines.source.servers[0].process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match="killed by signal 9"):
            while time.monotonic() < deadline:
                engines.check()
                time.sleep(0.1)
    assert not psutil.wait_procs(family, timeout=10)[1]
