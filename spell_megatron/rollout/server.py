"""One vLLM server process: its command line, environment, port and log, and the guard that ends it with its parent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import spell_megatron
from spell_megatron.config.schema import ModelConfig, RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.processes.lifetime import kill_group
from spell_megatron.processes.signals import given_on
from spell_megatron.ranks import TRAINER_VARIABLES, slurm_job, slurm_restarts
from spell_megatron.rollout.transports.transport import Transport
from spell_megatron.training.families import FAMILIES

ALONE = 0.85
"""Share of the memory of its own GPUs that a server may use, unless rollout.gpu_memory_utilization says another."""
QUANTIZATION = "fp8_per_channel"
"""vLLM's name of what `rollout.quantization: fp8` means. Of its online kinds of float8 it is the finest that pads no
experts: the parts of padded ones (fp8_per_block) never add up to a whole in vLLM's count of a push."""
ROUTERS = ("*.mlp.gate",)
"""Layers that vLLM would quantise too."""
RATES = ("*.linear_attn.in_proj_ba",)
"""The same in linear attention: what its states decay by, and change by. Qwen's own checkpoints in float8 leave them.
They have a row for each head, and a number of rows that 16 does not divide ends the engine when it loads them."""


@dataclass(frozen=True)
class ServerSettings:
    """What all servers of a run have in common.

    Attributes:
        model: the policy.
        rollout: how it is served.
        seed: of the run.
        routing: have the engines of a mixture of experts return the experts of each token, where vLLM can.
    """

    model: ModelConfig
    rollout: RolloutConfig
    seed: int
    routing: bool


def server_command(settings: ServerSettings, transport: Transport, port: int, host: str = "127.0.0.1") -> list[str]:
    """Command line of one server, as `--dry-run` shows it. The key is not in it, because command lines are public."""
    model, rollout = settings.model, settings.rollout
    flags = {
        "--model": str(model.path),
        "--served-model-name": "policy",
        "--host": host,
        "--port": str(port),
        "--dtype": model.dtype,
        "--seed": str(settings.seed),
        "--max-model-len": str(rollout.sampling.longest_sequence),
        "--max-num-seqs": str(rollout.concurrency),
        "--tensor-parallel-size": str(rollout.tensor_parallel),
        "--scheduling-policy": "priority",
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": json.dumps({"backend": transport.name}),
        "--worker-extension-cls": "spell_megatron.rollout.worker.WorkerExtension",
        "--middleware": "spell_megatron.rollout.worker.RequireKey",
    }
    if rollout.quantization == "fp8":
        flags["--quantization"] = QUANTIZATION
        if layers := [*ROUTERS * _has_experts(model.path), *RATES * _has_linear_layers(model.path)]:
            flags["--quantization-config"] = json.dumps({"ignore": layers})
    if _has_linear_layers(model.path):
        # As the trainer's. Without a word of config.json on it, vLLM would keep states in the type of the weights.
        flags["--mamba-ssm-cache-dtype"] = "float32"
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *_words(flags),
        *(["--language-model-only"] if "text_config" in _hf_config(model.path) else []),
        *(_cpu_flags(settings) if transport.on_cpus else _gpu_flags(settings, transport)),
        "--skip-tokenizer-init",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
        *rollout.extra_args,
    ]


def _cpu_flags(settings: ServerSettings) -> list[str]:
    rollout = settings.rollout
    flags = {
        # Prefixes are shared in whole blocks; the default of 128 tokens on CPUs would miss short documents.
        "--block-size": "32",
        "--max-num-batched-tokens": str(max(4096, rollout.sampling.longest_sequence)),
        "--kv-cache-memory-bytes": str(int(rollout.cpu_kv_cache_gib * 2**30)),
    }
    # A prompt prefilled in parts with a seed of its own ends the engine on CPUs: after each part vLLM takes back a draw
    # (`gen.set_offset` in gpu_model_runner.py), and a "CPU Generator does not use offset". So prompts are prefilled
    # whole, and several of them share a batch of that size. The states of linear layers are cached where a part ends:
    # with them, there is no cache of prefixes.
    cache = "--no-enable-prefix-caching" if _has_linear_layers(settings.model.path) else "--enable-prefix-caching"
    return [*_words(flags), "--enforce-eager", "--no-enable-chunked-prefill", cache]


def _gpu_flags(settings: ServerSettings, transport: Transport) -> list[str]:
    memory = settings.rollout.gpu_memory_utilization or ALONE
    flags = ["--gpu-memory-utilization", str(memory), "--enable-prefix-caching"]
    if transport.colocated:
        flags.append("--enable-sleep-mode")
    if _has_experts(settings.model.path):
        if settings.routing:
            flags.append("--enable-return-routed-experts")
        if settings.rollout.quantization == "fp8":
            # Each push makes new kernel objects. Those of Triton hold no tensors of their own, which CUDA graphs would
            # go on reading.
            flags += ["--moe-backend", "triton"]
    return flags


def _words(flags: dict[str, str]) -> list[str]:
    return [word for flag in flags.items() for word in flag]


def _has_experts(model: Path) -> bool:
    return bool(_text_config(model).get("num_experts_per_tok"))


def _has_linear_layers(model: Path) -> bool:
    family = FAMILIES.get(_text_config(model).get("model_type", ""))
    return family is not None and family.delta_nets is not None


def _text_config(model: Path) -> dict[str, Any]:
    config = _hf_config(model)
    return config.get("text_config") or config


def _hf_config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def server_environment(transport: Transport, rollout: RolloutConfig, gpus: Sequence[str], key: str) -> dict[str, str]:
    """Environment of one server.

    Args:
        transport: of its weights.
        rollout: how it is served.
        gpus: names of its GPUs, as CUDA_VISIBLE_DEVICES lists them.
        key: that it demands. It is handed over here because command lines are public.
    """
    package = Path(spell_megatron.__file__).parent
    inherited = {name: value for name, value in os.environ.items() if name not in TRAINER_VARIABLES}
    common = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")])),
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # By default a server closes connections that were idle for 5 seconds, also those that a busy client just uses.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
        "HF_HUB_OFFLINE": "1",
    }
    environment = {**inherited, **common, **transport.environment, **kernel_variables(rollout)}
    if not transport.on_cpus:
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    # oneDNN keeps a kernel for every size of a batch that it has met, up to 1,024 of them: half a gigabyte more
    # after a hundred steps of a tiny model (tests/chaos, the soak).
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override --kv-cache-memory-bytes
    if find_spec("torchvision") is None:
        environment["PYTHONPATH"] += os.pathsep + str(package / "rollout" / "stand_ins")
    return environment | {
        "OMP_NUM_THREADS": str(rollout.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A lone worker runs in the engine's process: in one of its own it costs a start more, and
        # each step the two wait for each other busily. (The API server's process stays apart.)
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def kernel_variables(rollout: RolloutConfig) -> dict[str, str]:
    """Environment variables that choose vLLM's kernels."""
    return {"VLLM_BATCH_INVARIANT": "1"} if rollout.batch_invariant else {}


def start_command(settings: ServerSettings, transport: Transport) -> str:
    """What a user types to start a server that suits a run, on port 8000."""
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "<key>"} | kernel_variables(settings.rollout)
    words = ["python", *server_command(settings, transport, 8000)[1:]]
    return " ".join([*(f"{name}={value}" for name, value in variables.items()), *words])


# Ends the process group $2 when the process $1 has ended, however that came about, also after Slurm has signalled all
# three. (A server that gets a SIGTERM while it starts may wait for its engine for ever, so SIGKILL follows.) Then the
# group's temporary files, in the folder $3, go.
_GUARD = """
trap "" INT TERM USR1
while kill -0 "$1" && kill -0 "-$2"; do sleep 1; done 2>/dev/null
kill -TERM "-$2" && sleep 10 && kill -KILL "-$2"
rm -rf "$3"
"""


_LONGEST = 107 - len("/spell-12345678") - len("/12345678-1234-1234-1234-123456789012")
"""Length of a folder's path in which the folder of a server can hold sockets: their paths may have 107 letters."""


class Server:
    """A server process. It ends, with all its own processes, when this process does.

    Attributes:
        url: address at which it will serve.
        log: file that what it prints is added to, below a line that says which start this is.
        process: the server.
    """

    def __init__(self, url: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.url, self.log = url, log
        with log.open("ab") as output, given_on():
            job = f", job {number}, start {slurm_restarts() + 1}" if (number := slurm_job()) else ""
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            output.write(f"----- started {now} at {url} on {socket.gethostname()}{job}\n".encode())
            output.flush()
            self._log_start = output.tell()
            # vLLM leaves its sockets and a file of torch's where temporary files are. What torch compiles is kept.
            usual = tempfile.gettempdir()
            kept = "TORCHINDUCTOR_CACHE_DIR"
            compiled = environment.get(kept, str(Path(usual, f"torchinductor_{os.getuid()}")))
            self._temporary = tempfile.mkdtemp(prefix="spell-", dir=usual if len(usual) <= _LONGEST else "/tmp")
            self.process = subprocess.Popen(
                command,
                # What a process changes later must not come first: vLLM could not name its processes then.
                env={**environment, "TMPDIR": self._temporary, kept: compiled},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(os.getpid()), str(self.process.pid), self._temporary],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def last_words(self) -> str:
        """The lines of its log that say best why it ended, joined to one line."""
        return last_words(self.log, self._log_start)

    def stop(self, deadline: float) -> None:
        """Waits until a deadline (of time.monotonic) for the terminated server, then kills what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        for process in (self.process, self._guard):
            kill_group(process.pid)  # the workers are in the server's group
            process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)


def last_words(log: Path, start: int = 0) -> str:
    """The lines of a server's log, from the byte `start` on, that say best why it ended, joined to one line."""
    with log.open("rb") as file:
        file.seek(start)
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode(errors="replace"))
    # vLLM prefixes the lines of its processes: "(EngineCore pid=1) ERROR 01-01 00:00:00 [core.py:1] ".
    prefix = r"^(\([^)]*pid=\d+\) )?((ERROR|WARNING|INFO) \d\S* \S+ \[[^\]]*\] ?)?"
    lines = [re.sub(prefix, "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    errors = [
        line
        for line in dict.fromkeys(lines)
        if re.match(r"[\w.]*(Error|Exception|error)\b.*: ?\S", line) and "Engine core initialization failed" not in line
    ]
    return " | ".join(errors[-2:] or lines[-3:] or ["(nothing)"])[:1500]


@contextlib.contextmanager
def held_port(host: str, port: int, replica: int) -> Iterator[int]:
    """A port (0: any) for a replica's server, kept from other programs until the server listens.

    A server binds its port seconds after the port was chosen. Until then the machine could give the port to any
    connection. A socket that is bound and does not listen prevents that. It does not keep out the server, because
    both have SO_REUSEADDR.

    Raises:
        UserError: the port is taken.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            raise UserError(
                f"Port {port} of {host}, meant for engine {replica}, cannot be used: {error.strerror}. "
                "End the program that holds it (perhaps an engine of an earlier run), choose another "
                "rollout.base_port, or leave it out to have free ports chosen."
            ) from error
        yield held.getsockname()[1]
