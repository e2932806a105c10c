"""vLLM servers: started here or found running, checked, watched and stopped."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, TypeVar

import requests

import spell_megatron
from spell_megatron import ranks
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.processes.rendezvous import Rendezvous

Result = TypeVar("Result")

_STOP_SECONDS = 15.0
_WATCH_SECONDS = 5.0  # between looks at an engine that has been asked for something

MAX_RESTARTS = 3
"""How often engines may fail in one step; once more ends the run."""


class Engine:
    """One vLLM server as seen over HTTP."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy stands between us and an engine
        self._session.headers["Authorization"] = f"Bearer {api_key}"

    def healthy(self) -> bool:
        """Whether the server answers its health check."""
        try:
            return self._session.get(f"{self.url}/health", timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def responds(self, seconds: float) -> bool:
        """Whether it and all its workers answer a call within `seconds` (one that hangs calls itself healthy)."""
        try:
            return self.healthy() and bool(self.call("spell_describe", timeout=seconds))
        except requests.RequestException:
            return False

    def get(self, path: str) -> dict:
        """GETs a route's JSON. Raises requests.RequestException."""
        response = self._session.get(f"{self.url}{path}", timeout=60)
        response.raise_for_status()
        return response.json()

    def post(self, path: str, body: dict | None = None, *, timeout: float = 600.0, **params: str) -> dict:
        """POSTs to a route and returns its JSON, {} if there is none.

        Raises:
            requests.RequestException: no connection, no answer in time, an error status (the message then
                holds what the server said), or the engine ended meanwhile.
        """
        response = self._watched(
            lambda: self._session.post(f"{self.url}{path}", json=body, params=params, timeout=timeout)
        )
        if not response.ok:
            raise requests.HTTPError(
                f"{path} at {self.url}: HTTP {response.status_code}: {response.text[:1000]}",
                response=response,
            )
        return response.json() if response.content else {}

    def _watched(self, request: Callable[[], requests.Response]) -> requests.Response:
        """A request's response. A server whose core has died closes its port, but leaves the calls that are under way
        without an answer for as long as they wait."""
        answer: Future[requests.Response] = Future()

        def ask() -> None:
            try:
                answer.set_result(request())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        while not wait([answer], timeout=_WATCH_SECONDS).done:
            if self._ended():
                raise requests.ConnectionError(f"{self.url} has ended while it was asked for something")
        return answer.result()

    def _ended(self) -> bool:
        """Whether there is no server any more, or it says that its core has died; one that is slow has not ended."""
        with requests.Session() as session:  # an open connection could be closed just now for having been idle
            session.trust_env = False
            try:
                return session.get(f"{self.url}/health", timeout=10).status_code >= 500
            except requests.Timeout:
                return False
            except requests.RequestException:
                return True

    def call(self, method: str, *args: str, timeout: float = 600.0) -> list:
        """Calls a method of `worker.WorkerExtension` in every worker; returns one result for each."""
        body = {"method": method, "args": list(args)}
        return self.post("/collective_rpc", body, timeout=timeout)["results"]


class Engines:
    """The engines of a run. A context manager: leaving it stops those that were started here.

    Attributes:
        engines: one per replica.
        api_key: key that all of them demand.
        weight_transfer: backend by which they receive weights: gloo, nccl or ipc.
        no_routing: why they do not return the experts of tokens, for users; "" if they do.
    """

    def __init__(self, config: Config, api_key: str, log_folder: Path, nodes: Rendezvous | None = None) -> None:
        self.engines: list[Engine] = []
        self.api_key = api_key
        self.weight_transfer = self.no_routing = ""
        self._config, self._log_folder = config, log_folder
        self._servers: list[_Server] = []
        self._restarts = 0
        self._nodes, self._requests = nodes, 0
        atexit.register(self.stop)

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    @classmethod
    def open(
        cls, config: Config, log_folder: Path, rendezvous: Rendezvous | None = None, trainers: int | None = None
    ) -> Engines:
        """Attaches to the engines of other nodes or of rollout.urls, or starts rollout.replicas servers here.

        Args:
            config: the run's configuration.
            log_folder: where the logs of started servers go, as engine-<replica>.log.
            rendezvous: where the engine nodes of a job publish their servers (see `serve`), if it has any.
            trainers: trainer processes that need GPUs of this machine; by default those of the configuration.

        Raises:
            UserError: a port is taken, a server dies or does not become ready in
                rollout.start_timeout seconds, or an engine does not suit the configuration.
        """
        key = os.environ.get(config.rollout.api_key_env)
        if rendezvous and rendezvous.engine_nodes:
            engines = cls(config, rendezvous.key(), log_folder, rendezvous)
        elif config.rollout.urls and not key:
            raise UserError(
                f"rollout.urls names running engines, but the environment variable "
                f"{config.rollout.api_key_env} that should hold their key is not set. Set it to the "
                "VLLM_API_KEY they were started with."
            )
        else:
            engines = cls(config, key or secrets.token_urlsafe(32), log_folder)
        try:
            if engines._nodes:
                engines._read_nodes()
            elif config.rollout.urls:
                engines.engines = [Engine(url, engines.api_key) for url in config.rollout.urls]
            else:
                if trainers is None:
                    trainers = ranks.local_processes() or config.training.parallel.processes
                engines._start_all(range(config.rollout.replicas), trainers)
            engines._check_fit(config)
        except BaseException:
            engines.stop()
            raise
        return engines

    @classmethod
    def serve(
        cls, config: Config, log_folder: Path, rendezvous: Rendezvous, node: int, colocated: bool = False
    ) -> None:
        """Runs one node's share of the engines until this process is ended; the trainer finds them by the rendezvous.

        Those that the trainer gives up (`restart`) are started again.

        Args:
            config: the run's configuration; its rollout.replicas are spread over the engine nodes.
            log_folder: as in `open`.
            rendezvous: of the job.
            node: number of this node among the engine nodes.
            colocated: they share their GPUs with trainer processes.

        Raises:
            UserError: as `open`.
        """
        share, rest = divmod(config.rollout.replicas, rendezvous.engine_nodes)
        if rest:
            raise UserError(
                f"rollout.replicas = {config.rollout.replicas} engines cannot be spread evenly over "
                f"{rendezvous.engine_nodes} engine nodes. Use a multiple of the number of nodes."
            )
        with cls(config, rendezvous.key(), log_folder) as engines:
            trainers = config.training.parallel.processes // rendezvous.engine_nodes if colocated else 0
            engines._start_all(range(node * share, (node + 1) * share), trainers, rendezvous.address())
            request = 0
            while True:
                rendezvous.publish(f"engines-{node}", {"urls": engines.urls, "request": request})
                print("engines ready at " + ", ".join(engines.urls), flush=True)
                request += 1
                broken = rendezvous.wait(f"restart-{request}")["urls"]
                # How often is the trainer's affair.
                engines._renew([number for number, url in enumerate(engines.urls) if url in broken])

    def _start_all(self, replicas: range, trainers: int, host: str = "127.0.0.1") -> None:
        """Servers for some of the run's replicas, on GPUs that `trainers` processes of this machine leave free."""
        self._host, self._first = host, replicas.start
        self._placement, self._backend = _placement(self._config, len(replicas), trainers)
        self._log_folder.mkdir(parents=True, exist_ok=True)
        self._start(range(len(replicas)))

    def _start(self, numbers: Sequence[int], fresh_logs: bool = False) -> None:
        """Starts these servers, in place of earlier ones, and waits until they are ready."""
        config, base = self._config, self._config.rollout.base_port
        with contextlib.ExitStack() as stack:
            for number in numbers:
                replica = self._first + number
                port = stack.enter_context(_held_port(self._host, 0 if base is None else base + number, replica))
                log = self._log_folder / f"engine-{replica}.log"
                environment = _environment(config, self.api_key, self._placement[number], self._backend)
                command = server_command(config, port, self._backend, self._host)
                server = _Server(command, environment, _unused(log) if fresh_logs else log)
                self._servers[number : number + 1] = [server]
                self.engines[number : number + 1] = [Engine(f"http://{self._host}:{port}", self.api_key)]
            self._wait_until_healthy(numbers)

    def _renew(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._servers[number].process.kill()
            self._servers[number].stop(time.monotonic())
        self._start(numbers, fresh_logs=True)

    def _read_nodes(self) -> None:
        """Takes the engines that the engine nodes have published since the last request to restart some."""
        # They start while this process does, and give up themselves after start_timeout.
        seconds = self._config.rollout.start_timeout + 60
        published = [
            self._nodes.wait(f"engines-{node}", seconds, lambda content: content["request"] == self._requests)
            for node in range(self._nodes.engine_nodes)
        ]
        self.engines = [Engine(url, self.api_key) for node in published for url in node["urls"]]

    def _wait_until_healthy(self, numbers: Sequence[int]) -> None:
        seconds = self._config.rollout.start_timeout
        deadline = time.monotonic() + seconds
        for number in numbers:
            engine = self.engines[number]
            while not engine.healthy():
                self.check(numbers)
                if time.monotonic() > deadline and self._servers:
                    log = self._servers[number].log
                    raise UserError(
                        f"An engine was not ready after {seconds:g} s. Its log, {log}, ends with: "
                        f"{last_words(log)}. Give it more time with rollout.start_timeout, or see "
                        "in the log what it waits for."
                    )
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{engine.url} did not answer for {seconds:g} s (rollout.start_timeout). Look into its "
                        "log, start it again, and resume the run from its last checkpoint."
                    )
                time.sleep(0.25)

    def check(self, replicas: Sequence[int] | None = None) -> None:
        """Raises UserError if a server that was started here has ended, of these replicas if any are named."""
        for number, server in enumerate(self._servers):
            status = server.process.poll()
            if status is None or (replicas is not None and number not in replicas):
                continue
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise UserError(
                f"An engine (vLLM server, process {server.process.pid}) {how}. Its log ends with: "
                f"{last_words(server.log)}. The whole log is {server.log}; correct what it names "
                "(memory, rollout.extra_args, the model folder) and start the run again."
            )

    @property
    def restartable(self) -> bool:
        """Whether `restart` starts servers, rather than waiting for somebody to do so."""
        return not self._config.rollout.urls

    def failed(self) -> list[int]:
        """Engines that have ended or hang."""
        responds = self._at_once(lambda engine: engine.responds(self._config.rollout.hang_timeout))
        return [number for number, well in enumerate(responds) if not well]

    def health(self) -> list[dict]:
        """Address of each engine, and whether it says that it is well."""
        return self._at_once(lambda engine: {"url": engine.url, "healthy": engine.healthy()})

    def _at_once(self, action: Callable[[Engine], Result]) -> list[Result]:
        """Results of an action on each engine; one that does not answer keeps no other waiting."""
        with ThreadPoolExecutor(len(self.engines)) as threads:
            return list(threads.map(action, list(self.engines)))

    def sleep(self) -> None:
        """Has engines that share their GPUs with the trainer give up weights and KV cache, until `wake`."""
        self._if_colocated("/sleep", level="2", mode="wait")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Has engines that sleep take memory for their weights (to be pushed), or for the KV cache, again."""
        self._if_colocated("/wake_up", tags=part)

    def _if_colocated(self, path: str, **params: str) -> None:
        if self.weight_transfer != "ipc":
            return
        try:
            self._at_once(lambda engine: engine.post(path, **params))
        except requests.RequestException as error:
            raise UserError(
                f"An engine cannot free or take GPU memory ({error}). Look into its log; if memory is short, lower "
                "rollout.gpu_memory_utilization or training.tokens_per_microbatch, and resume the run."
            ) from error

    def new_step(self) -> None:
        """Counts failures anew."""
        self._restarts = 0

    def restart(self, numbers: Sequence[int]) -> None:
        """Starts the servers of these engines anew: they have other addresses then, and the model folder's weights.
        For engines of rollout.urls it only waits, until all of them answer.

        Raises:
            UserError: it was called more than MAX_RESTARTS times in this step, or they do not become ready.
        """
        if self._restarts == MAX_RESTARTS:
            self.check()
            raise UserError(
                f"The engines ({', '.join(self.urls)}) failed {MAX_RESTARTS + 1} times in one step. Look into their "
                f"logs (of those started here in {self._log_folder}), mend what they name, and resume the run from its "
                "last checkpoint."
            )
        self._restarts += 1
        if self._nodes:
            self._requests += 1
            self._nodes.publish(f"restart-{self._requests}", {"urls": [self.urls[number] for number in numbers]})
            self._read_nodes()
        elif self._config.rollout.urls:
            self._wait_until_healthy(range(len(self.engines)))
        else:
            self._renew(numbers)
        self._check_fit(self._config)

    def _check_fit(self, config: Config) -> None:
        described = [_check_engine(engine, config) for engine in self.engines]
        backends = {about["weight_transfer"] for about in described}
        if len(backends) > 1:
            raise UserError(
                f"The engines of rollout.urls receive weights by different backends ({sorted(backends)}). "
                "Start all with the same --weight-transfer-config."
            )
        self.weight_transfer = backends.pop()
        silent = [engine.url for engine, about in zip(self.engines, described) if not about["routed_experts"]]
        if silent and self.weight_transfer == "gloo":
            self.no_routing = "vLLM does not return the experts of tokens on CPUs"
        elif silent:
            self.no_routing = f"the engine at {silent[0]} was started without --enable-return-routed-experts"

    def stop(self) -> None:
        """Ends the servers that were started here, with all their processes. May be called again."""
        for server in self._servers:
            server.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for server in self._servers:
            server.stop(deadline)
        self._servers.clear()
        atexit.unregister(self.stop)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _unused(log: Path) -> Path:
    """The path itself, or with a number: logs of servers that failed are kept."""
    number = 1
    path = log
    while path.exists():
        number += 1
        path = log.with_stem(f"{log.stem}-{number}")
    return path


# Ends the process group $2 when the process $1 has ended, however that came about. (A server that gets a
# SIGTERM while it starts may wait for its engine for ever, so SIGKILL follows.)
_GUARD = """
while kill -0 "$1" && kill -0 "-$2"; do sleep 1; done 2>/dev/null
kill -TERM "-$2" && sleep 10 && kill -KILL "-$2"
"""


class _Server:
    """A server process and its log; it ends, with all its processes, when this process does."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(os.getpid()), str(self.process.pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self, deadline: float) -> None:
        """Waits until a deadline (time.monotonic) for the terminated server, then ends what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        for process in (self.process, self._guard):
            # Workers are in the server's group: whatever is left of it goes too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def server_command(config: Config, port: int, weight_transfer: str, host: str = "127.0.0.1") -> list[str]:
    """Command line of one server, as `--dry-run` shows it. The key is not in it."""
    rollout = config.rollout
    flags = {
        "--model": str(config.model.path),
        "--served-model-name": "policy",
        "--host": host,
        "--port": str(port),
        "--dtype": config.model.dtype,
        "--seed": str(config.run.seed),
        "--max-model-len": str(longest_sequence(config)),
        "--max-num-seqs": str(rollout.concurrency),
        "--tensor-parallel-size": str(rollout.tensor_parallel),
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": json.dumps({"backend": weight_transfer}),
        "--worker-extension-cls": "spell_megatron.rollout.worker.WorkerExtension",
        "--middleware": "spell_megatron.rollout.worker.RequireKey",
    }
    if weight_transfer == "gloo":
        # A prompt prefilled in parts with a seed of its own ends the engine on CPUs ("CPU Generator does
        # not use offset"), so prompts are prefilled whole and several of them share a batch of this size.
        switches = ["--enforce-eager", "--no-enable-chunked-prefill"]
        # Prefixes are shared in whole blocks; the default of 128 tokens on CPUs would miss short documents.
        flags["--block-size"] = "32"
        flags["--max-num-batched-tokens"] = str(max(4096, longest_sequence(config)))
        flags["--kv-cache-memory-bytes"] = str(int(rollout.cpu_kv_cache_gib * 2**30))
    else:
        switches = ["--enable-sleep-mode"] if weight_transfer == "ipc" else []
        flags["--gpu-memory-utilization"] = str(rollout.gpu_memory_utilization)
        if config.training.routing_replay and _has_experts(config.model.path):
            switches.append("--enable-return-routed-experts")
    switches += [
        "--skip-tokenizer-init",
        "--enable-prefix-caching",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
    ]
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(word for flag in flags.items() for word in flag),
        *switches,
        *rollout.extra_args,
    ]


def _has_experts(model: Path) -> bool:
    path = model / "config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("num_experts_per_tok"))


def longest_sequence(config: Config) -> int:
    """Tokens that an engine must have room for: the longest prompt and the longest response."""
    sampling = config.rollout.sampling
    responses = (
        sampling.max_response_tokens,
        sampling.max_verdict_tokens or 0,
        sampling.max_no_context_tokens or 0,
    )
    return sampling.max_prompt_tokens + max(responses)


def last_words(log: Path) -> str:
    """The lines of a server's log that say best why it ended, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
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
def _held_port(host: str, port: int, replica: int) -> Iterator[int]:
    """A port (0: any) for a replica's server, kept from other programs until the server listens.

    A server binds its port seconds after it was chosen; until then any connection of this machine
    could be given it. A socket that is bound and does not listen prevents that, and does not keep out
    the server, because both have SO_REUSEADDR.

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


def _placement(config: Config, replicas: int, trainers: int) -> tuple[list[list[str]], str]:
    """GPUs of each server, and the backend by which weights reach them.

    Servers take the GPUs that the trainer leaves free. If trainer and engines both need all of them,
    they share them, and weights go from process to process by CUDA IPC.
    """
    gpus = [] if config.run.device == "cpu" else _visible_gpus()
    if not gpus:
        return [[] for _ in range(replicas)], "gloo"
    each, free = config.rollout.tensor_parallel, gpus[trainers:]
    if len(free) >= replicas * each:
        return [free[i * each : (i + 1) * each] for i in range(replicas)], "nccl"
    if len(gpus) == trainers == replicas * each:
        return [gpus[i * each : (i + 1) * each] for i in range(replicas)], "ipc"
    raise UserError(
        f"This machine shows {len(gpus)} GPU(s): {trainers} for the trainer leave {max(0, len(free))} for "
        f"{replicas} engine(s) of {each} GPU(s). Lower rollout.replicas or rollout.tensor_parallel, "
        "use fewer trainer processes, or start engines on other machines and name them in rollout.urls."
    )


def _visible_gpus() -> list[str]:
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in names.split(",") if name] if torch.cuda.is_available() else []


def _environment(config: Config, key: str, gpus: list[str], weight_transfer: str) -> dict[str, str]:
    """Environment of a server; the key is handed over here because command lines are public."""
    package_root = str(Path(spell_megatron.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ranks.TORCHRUN_VARIABLES:
        environment.pop(name, None)
    if weight_transfer == "gloo":
        environment |= {
            "OMP_NUM_THREADS": str(config.rollout.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # A lone worker runs in the engine's process: in one of its own it costs a start more, and
            # each step the two wait for each other busily. (The API server's process stays apart.)
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        # oneDNN keeps a kernel for every size of a batch that it has met, up to 1,024 of them: half a gigabyte more
        # after a hundred steps of a tiny model (tests/chaos, the soak).
        environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override --kv-cache-memory-bytes
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if weight_transfer == "ipc":
        # Handles of GPU memory travel pickled; only holders of the key can send any.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return environment


def _check_engine(engine: Engine, config: Config) -> dict:
    """Checks that an engine suits the run; returns what it says of itself (`worker.spell_describe`)."""
    if not engine.healthy():
        raise UserError(
            f"No healthy engine answers at {engine.url} (rollout.urls). Start it, wait until its /health "
            "answers, or correct the address."
        )
    flags = "VLLM_SERVER_DEV_MODE=1 VLLM_API_KEY=<key> python -m vllm.entrypoints.openai.api_server " + " ".join(
        server_command(config, 8000, "<gloo|nccl>")[3:]
    )
    try:
        about = engine.call("spell_describe", timeout=120)[0]
        paused = engine.get("/is_paused")["is_paused"]
        engine.get("/openapi.json")["paths"]["/inference/v1/generate"]
    except (requests.RequestException, KeyError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise UserError(
                f"The engine at {engine.url} refuses the API key. Set {config.rollout.api_key_env} to the "
                "VLLM_API_KEY it was started with."
            ) from error
        raise UserError(
            f"The engine at {engine.url} lacks a route that the run needs ({error}). Start it as: {flags}"
        ) from error
    faults = []
    model = json.loads((config.model.path / "config.json").read_text(encoding="utf-8"))
    sizes = [model.get(name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    if [about["architecture"], about["sizes"]] != [model["architectures"][0], sizes]:
        faults.append(
            f"it serves {about['architecture']} with hidden size, layers, vocabulary {about['sizes']}, but "
            f"model.path is {model['architectures'][0]} with {sizes}"
        )
    if about["dtype"] != config.model.dtype:
        faults.append(f"it computes in {about['dtype']}, but model.dtype is {config.model.dtype}")
    if about["max_model_len"] < longest_sequence(config):
        faults.append(
            f"its --max-model-len {about['max_model_len']} is less than the {longest_sequence(config)} "
            "tokens of the longest prompt and response in rollout.sampling"
        )
    if about["logprobs_mode"] != "processed_logprobs":
        faults.append(f"its --logprobs-mode is {about['logprobs_mode']}, not processed_logprobs")
    if about["weight_transfer"] is None:
        faults.append("it was started without --weight-transfer-config")
    if paused:
        faults.append("it is paused, perhaps by a weight update that was interrupted: restart it")
    if faults:
        raise UserError(f"The engine at {engine.url} does not suit the run: {'; '.join(faults)}. Start it as: {flags}")
    return about
