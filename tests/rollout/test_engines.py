"""Real servers: start, guard, failures, stop."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import psutil
import pytest
import requests
from engine_fixtures import engine_config

from spell_megatron.errors import UserError
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.rollout.engines import Engines, _environment, _held_port, _placement, last_words, server_command


def test_every_route_but_health_demands_the_key(engines_for):
    engines = engines_for("dense")
    url = engines.urls[0]
    paths = requests.get(
        f"{url}/openapi.json", headers={"Authorization": f"Bearer {engines.api_key}"}, timeout=30
    ).json()["paths"]
    assert {"/update_weights", "/collective_rpc", "/pause", "/inference/v1/generate"} <= paths.keys()
    open_routes = []
    for path, methods in paths.items():
        for method in methods:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                status = requests.request(method, url + path, headers=headers, timeout=30).status_code
                if status != 401:
                    open_routes.append((method, path, status))
    assert {path for _, path, _ in open_routes} == {"/health"}


def test_the_key_is_not_on_any_command_line(engines_for):
    engines = engines_for("dense")
    for process in psutil.process_iter(["cmdline"]):
        assert engines.api_key not in " ".join(process.info["cmdline"] or ())


def test_port_in_use(policy, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} .*base_port"):
            Engines.open(engine_config(policy("dense"), base_port=port), tmp_path)
    assert not list(tmp_path.iterdir())


def test_engines_that_share_gpus_sleep(engines_for, monkeypatch):
    """Only the calls: vLLM has nothing to free on CPUs."""
    engines = engines_for("dense")
    (engine,) = engines.engines
    engines.sleep()
    assert engine.get("/is_sleeping") == {"is_sleeping": False}  # no GPU is shared
    monkeypatch.setattr(engines, "weight_transfer", "ipc")
    engines.sleep()
    assert engine.get("/is_sleeping") == {"is_sleeping": True}
    engines.wake("weights")
    assert engine.get("/is_sleeping") == {"is_sleeping": True}
    engines.wake("kv_cache")
    assert engine.get("/is_sleeping") == {"is_sleeping": False}


def test_a_chosen_port_is_the_servers_alone():
    with _held_port("127.0.0.1", 0, 0) as port, _held_port("127.0.0.1", 0, 1) as another:
        assert port != another
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as server:  # as vLLM does
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()


def test_attaching_names_what_does_not_fit(engines_for, policy, monkeypatch, tmp_path: Path):
    engines = engines_for("dense")
    monkeypatch.setenv("SPELL_API_KEY", engines.api_key)

    def attach(model: Path, **rollout: object) -> Engines:
        return Engines.open(engine_config(model, urls=engines.urls, **rollout), tmp_path)

    attached = attach(policy("dense", 1))
    assert (attached.urls, attached.weight_transfer) == (engines.urls, "gloo")
    assert "on CPUs" in attached.no_routing
    attached.stop()
    assert engines.engines[0].healthy()  # what was not started here is not stopped here

    with pytest.raises(UserError, match="serves Qwen3ForCausalLM .*Qwen3MoeForCausalLM.*--middleware"):
        attach(policy("moe"))
    long = {"sampling": {"max_prompt_tokens": 4000, "max_response_tokens": 100}}
    with pytest.raises(UserError, match="--max-model-len 1024 is less than the 4100 tokens"):
        attach(policy("dense"), **long)
    engines.engines[0].post("/pause")
    with pytest.raises(UserError, match="paused"):
        attach(policy("dense"))
    engines.engines[0].post("/resume")
    with pytest.raises(UserError, match="No healthy engine answers at http://127.0.0.1:9"):
        Engines.open(engine_config(policy("dense"), urls=["http://127.0.0.1:9"]), tmp_path)
    monkeypatch.setenv("SPELL_API_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the API key"):
        attach(policy("dense"))
    monkeypatch.delenv("SPELL_API_KEY")
    with pytest.raises(UserError, match="SPELL_API_KEY"):
        attach(policy("dense"))


@pytest.mark.slow  # test_train sees the same from outside
def test_an_engine_that_dies_at_start_is_quoted(policy, tmp_path: Path):
    broken = shutil.copytree(policy("dense"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError) as caught:
        Engines.open(engine_config(broken), tmp_path / "logs")
    message = str(caught.value)
    assert "ended with status" in message and "\n" not in message
    assert "incomplete metadata" in message.lower() or "safetensor" in message.lower()
    assert str(tmp_path / "logs" / "engine-0.log") in message


def test_last_words_prefer_the_cause(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(
        "(EngineCore pid=7) INFO 11-02 10:00:00 [core.py:1] starting\n"
        "(EngineCore pid=7) ERROR 11-02 10:00:01 [core.py:9] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-02 10:00:01 [core.py:9] ValueError: no room for the KV cache\n"
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_words(log) == "ValueError: no room for the KV cache"
    log.write_text("one\n\ntwo\nKilled\n")
    assert last_words(log) == "one | two | Killed"


def test_gpus_are_given_to_trainer_and_engines(policy, monkeypatch):
    from spell_megatron.rollout import engines as module

    def placed(gpus: int, trainers: int, **rollout: object):
        monkeypatch.setattr(module, "_visible_gpus", lambda: [str(i) for i in range(gpus)])
        config = engine_config(policy("dense"), **rollout)
        config.run.device = "auto"
        return config, *_placement(config, config.rollout.replicas, trainers)

    config, gpus, backend = placed(8, 4, replicas=2, tensor_parallel=2)
    assert (gpus, backend) == ([["4", "5"], ["6", "7"]], "nccl")
    environment = _environment(config, "secret", gpus[1], backend)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    command = server_command(config, 1, backend)
    assert "--enforce-eager" not in command and "--gpu-memory-utilization" in command
    flag = "--enable-return-routed-experts"
    assert flag not in command
    config.model.path = policy("moe")
    assert flag in server_command(config, 1, backend) and flag not in server_command(config, 1, "gloo")
    config.training.routing_replay = False
    assert flag not in server_command(config, 1, backend)
    assert placed(1, 1)[1:] == ([["0"]], "ipc")
    assert placed(4, 4, replicas=2, tensor_parallel=2)[1:] == ([["0", "1"], ["2", "3"]], "ipc")
    assert placed(0, 2, replicas=2)[1:] == ([[], []], "gloo")
    assert placed(4, 0, replicas=2, tensor_parallel=2)[1:] == ([["0", "1"], ["2", "3"]], "nccl")  # an engine node
    with pytest.raises(UserError, match="rollout.replicas"):
        placed(4, 3, replicas=2)


def test_engines_of_other_nodes_are_found(engines_for, policy, tmp_path: Path):
    """By what they publish; they are left running. Replicas that do not divide over the nodes are refused."""
    engines = engines_for("dense")
    rendezvous = Rendezvous(tmp_path, engine_nodes=1)
    (tmp_path / "key").write_text(engines.api_key)
    rendezvous.publish("engines-0", {"urls": engines.urls, "request": 0})
    with Engines.open(engine_config(policy("dense")), tmp_path, rendezvous) as found:
        assert found.urls == engines.urls and found.weight_transfer == "gloo"
    assert engines.engines[0].healthy()
    with pytest.raises(UserError, match="3 engines cannot be spread evenly over 2"):
        Engines.serve(engine_config(policy("dense"), replicas=3), tmp_path, Rendezvous(tmp_path, 2), 0)


_STARTER = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from engine_fixtures import engine_config
from spell_megatron.rollout.engines import Engines
engines = Engines.open(engine_config(Path(sys.argv[1])), Path(sys.argv[2]))
print(engines._servers[0].process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_no_server_outlives_a_killed_parent(hangs, policy, tmp_path: Path):
    code = _STARTER.format(tests=str(Path(__file__).parents[1]))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(policy("dense")), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        server = psutil.Process(int(parent.stdout.readline()))
        family = [*psutil.Process(parent.pid).children(recursive=True)]
        assert server in family and len(family) > 2
        if hangs:
            server.suspend()  # SIGTERM has no effect on it now
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
def test_a_call_to_a_core_that_dies_fails(policy, tmp_path: Path):
    """The server would leave it without an answer."""
    with Engines.open(engine_config(policy("dense")), tmp_path) as engines:
        server = psutil.Process(engines._servers[0].process.pid)
        (core,) = (child for child in server.children(recursive=True) if "EngineCore" in child.name())
        core.suspend()
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(engines.engines[0].call, "spell_describe", timeout=300)
            assert not wait([call], timeout=7).done  # longer than between two looks at the engine
            core.kill()
            with pytest.raises(requests.ConnectionError, match="has ended while"):
                call.result(timeout=120)
        assert engines.failed() == [0]


@pytest.mark.slow
def test_a_server_that_dies_later_is_noticed(policy, tmp_path: Path):
    with Engines.open(engine_config(policy("dense")), tmp_path) as engines:
        engines.check()
        family = psutil.Process(engines._servers[0].process.pid).children(recursive=True)
        os.killpg(engines._servers[0].process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match="killed by signal 9"):
            while time.monotonic() < deadline:
                engines.check()
                time.sleep(0.1)
    assert not psutil.wait_procs(family, timeout=10)[1]
