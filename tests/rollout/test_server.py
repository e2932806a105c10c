"""One server process: port, command line, environment, log, end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import vllm.envs
from engine_fixtures import engine_config
from families import hf_config

from spell_megatron.config.schema import RolloutConfig
from spell_megatron.ranks import TRAINER_VARIABLES
from spell_megatron.rollout.server import (
    Server,
    ServerSettings,
    held_port,
    last_words,
    server_command,
    server_environment,
    start_command,
)
from spell_megatron.rollout.transports.gloo import GLOO
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL


def test_a_chosen_port_is_the_servers_alone():
    with held_port("127.0.0.1", 0, 0) as port, held_port("127.0.0.1", 0, 1) as another:
        assert port != another
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as server:  # as vLLM does
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()


def test_a_server_gets_what_its_transport_implies(policy):
    def command(transport, kind: str = "dense", routing: bool = True) -> list[str]:
        config = engine_config(policy(kind), replicas=2, tensor_parallel=2)
        return server_command(ServerSettings(config.model, config.rollout, 0, routing), transport, 1)

    assert server_environment(NCCL, RolloutConfig(), ["6", "7"], "secret")["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "--enforce-eager" not in command(NCCL) and "--gpu-memory-utilization" in command(NCCL)
    flag = "--enable-return-routed-experts"
    assert flag not in command(NCCL)
    assert flag in command(NCCL, "moe") and flag not in command(GLOO, "moe")
    assert flag not in command(NCCL, "moe", routing=False)

    assert "--enforce-eager" in command(GLOO) and "--gpu-memory-utilization" not in command(GLOO)
    on_cpus = server_environment(GLOO, RolloutConfig(threads=3), [], "secret")
    assert (on_cpus["VLLM_API_KEY"], on_cpus["OMP_NUM_THREADS"]) == ("secret", "3")
    idle = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"  # much longer than the client keeps a connection that is not used
    assert int(on_cpus[idle]) == 60 and idle in vllm.envs.environment_variables
    pickles = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    assert [pickles in server_environment(t, RolloutConfig(), ["0"], "secret") for t in (GLOO, NCCL, IPC)] == [
        False,
        False,
        True,
    ]
    assert ["--enable-sleep-mode" in command(t) for t in (GLOO, NCCL, IPC)] == [False, False, True]
    assert all("--enable-prefix-caching" in command(t) for t in (GLOO, NCCL, IPC))
    # vLLM caches states of linear layers where it has cut a prompt, which on CPUs it must not
    hybrid = [command(transport, "qwen3_5_text") for transport in (GLOO, NCCL, IPC)]
    assert ["--enable-prefix-caching" in flags for flags in hybrid] == [False, True, True]
    assert all("--mamba-ssm-cache-dtype" in flags for flags in hybrid)
    assert "--mamba-ssm-cache-dtype" not in command(GLOO)


def test_an_engine_on_cpus_imports_images_code_without_torchvision(monkeypatch):
    """It gets a stand-in, but never beside the real one."""
    monkeypatch.setattr("spell_megatron.rollout.server.find_spec", lambda name: None)
    environment = server_environment(GLOO, RolloutConfig(), [], "secret")
    places = environment["PYTHONPATH"].split(os.pathsep)
    code = "from torchvision.transforms.v2 import functional; from torchvision.transforms import InterpolationMode"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert "torchvision.py" in os.listdir(places[-1])
    monkeypatch.setattr("spell_megatron.rollout.server.find_spec", lambda name: name)
    assert places[-1] not in server_environment(GLOO, RolloutConfig(), [], "secret")["PYTHONPATH"]
    assert places[-1] not in server_environment(NCCL, RolloutConfig(), ["0"], "secret")["PYTHONPATH"]


def test_a_server_gets_the_kernels_that_are_asked_for(policy):
    def command(transport, kind: str) -> str:
        config = engine_config(policy(kind), "bfloat16", quantization="fp8")
        return " ".join(server_command(ServerSettings(config.model, config.rollout, 0, True), transport, 1))

    assert all("--quantization fp8_per_channel" in command(t, "dense") for t in (GLOO, NCCL, IPC))
    assert "--moe-backend triton" in command(IPC, "moe") and "--moe-backend" not in command(IPC, "dense")
    ignored = {"dense": [], "moe": ["*.mlp.gate"], "vision": ["*.linear_attn.in_proj_ba"]}
    for kind, layers in ignored.items():
        assert (json.dumps({"ignore": layers}) in command(IPC, kind)) == bool(layers)
    variable = "VLLM_BATCH_INVARIANT"
    assert variable not in server_environment(NCCL, RolloutConfig(), ["0"], "secret")
    rollout = RolloutConfig(batch_invariant=True)
    assert server_environment(NCCL, rollout, ["0"], "secret")[variable] == "1"
    settings = ServerSettings(engine_config(policy("dense")).model, rollout, 0, False)
    assert f"{variable}=1 python -m vllm.entrypoints" in start_command(settings, NCCL)


def test_a_model_that_also_sees_images_is_served_without_its_vision_tower(policy, tmp_path: Path):
    hf_config("qwen3_5_moe_text", vision=True).save_pretrained(tmp_path)

    def command(model: Path) -> list[str]:
        config = engine_config(model)
        return server_command(ServerSettings(config.model, config.rollout, 0, True), NCCL, 1)

    assert {"--language-model-only", "--enable-return-routed-experts"} <= {*command(tmp_path)}
    assert "--language-model-only" not in command(policy("moe"))


def test_a_server_inherits_nothing_that_is_meant_for_trainer_processes(monkeypatch):
    names = {*TRAINER_VARIABLES, "CUDA_DEVICE_MAX_CONNECTIONS"}
    for name in names:
        monkeypatch.setenv(name, "1")
    for transport in (GLOO, NCCL, IPC):
        assert not names & set(server_environment(transport, RolloutConfig(), ["0"], "secret"))


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


def test_a_start_adds_to_the_log_of_the_one_before(tmp_path: Path):
    """Each knows its own last words."""
    log = tmp_path / "log"
    slow = Server("http://one", ["bash", "-c", "echo 'ValueError: late'"], {"PATH": os.environ["PATH"]}, log)
    slow.stop(time.monotonic() + 5)
    fast = Server("http://two", [sys.executable, "-c", "print('two')"], {}, log)
    fast.stop(time.monotonic() + 30)
    lines = log.read_text().splitlines()
    assert [line.split(" at ")[1].split()[0] for line in lines if line.startswith("----- started")] == [
        slow.url,
        fast.url,
    ]
    assert "ValueError: late" in lines and fast.last_words() == "two" and "ValueError: late" in slow.last_words()


@pytest.mark.parametrize("length", [30, 55, 56, 200])
@pytest.mark.parametrize("end", ["stopped", "died"])
def test_a_server_leaves_no_temporary_files(length, end, monkeypatch):
    """Wherever the machine has them: the path of a socket has a limit."""
    with tempfile.TemporaryDirectory(prefix="t") as short:
        usual = Path(short.ljust(length - 2, "x"), "y")
        usual.mkdir(parents=True)
        monkeypatch.setattr(tempfile, "tempdir", str(usual))
        code = """if True:
            import os, socket, uuid
            socket.socket(socket.AF_UNIX).bind(f"{os.environ['TMPDIR']}/{uuid.uuid4()}")"""
        server = Server("http://one", [sys.executable, "-c", code], {"PATH": os.environ["PATH"]}, Path(short, "log"))
        assert server.process.wait(30) == 0, server.last_words()
        folder = Path(server._temporary)
        assert (folder.parent == usual) == (length < 56)
        if end == "died":  # its guard sees to it
            server._guard.wait(30)
            assert not folder.exists()
        server.stop(time.monotonic())
        assert not folder.exists() and not list(usual.iterdir())


def test_a_server_that_is_killed_leaves_no_shared_memory(tmp_path):
    """Of its own, or of a process of its own that outlives it."""
    code = """if True:
        import multiprocessing, sys, time
        from multiprocessing.shared_memory import SharedMemory
        def hold():
            shared = SharedMemory(create=True, size=1000)
            print(shared.name, flush=True)
            time.sleep(600)
        multiprocessing.resource_tracker.ensure_running()
        multiprocessing.get_context("fork").Process(target=hold).start()
        hold()"""
    server = Server("http://one", [sys.executable, "-c", code], {"PATH": os.environ["PATH"]}, tmp_path / "log")
    while len(names := server.log.read_text().split("\n")[1:-1]) < 2:
        assert server.process.poll() is None, server.last_words()
        time.sleep(0.05)
    assert all(Path("/dev/shm", name).exists() for name in names)
    server.process.kill()
    server.stop(time.monotonic() + 10)
    assert not any(Path("/dev/shm", name).exists() for name in names)


_STARTER = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from engine_fixtures import engine_config, open_engines
engines = open_engines(engine_config(Path(sys.argv[1])), Path(sys.argv[2]))
print(engines.source.servers[0].process.pid, flush=True)
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
