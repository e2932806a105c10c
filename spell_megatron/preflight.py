"""What can be known to go wrong before any model is loaded: files, the model's limits, ports, disks.

`spell_megatron.config.schema` checks a configuration by itself; this module checks it against the machine.
Nothing here writes anything or loads weights.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from spell_megatron.config.faults import Fault, involves, raise_faults
from spell_megatron.config.relations import trains_verifier
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.ranks import launched_processes
from spell_megatron.selfplay.documents import load_clusters
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler

Result = TypeVar("Result")

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention for CPUs was written for; with another size it dies at the first request."""


def preflight(config: Config, resume: Path | None = None) -> list[str]:
    """Check a valid configuration against this machine.

    `resume` is the folder of the run to be continued. Returns warnings; raises UserError that lists
    every fault, one a line.
    """
    faults, warnings = find_faults(config, resume)
    raise_faults(faults, "the configuration")
    return warnings


def find_faults(
    config: Config, resume: Path | None = None, known_faulty: Collection[str] = (), restarted: bool = False
) -> tuple[list[Fault], list[str]]:
    """(faults, warnings) of a configuration on this machine.

    `known_faulty` are keys that are known to be wrong already: what depends on them is left out. `restarted`: what
    is in the run's folder is of the same job, which was ended before its first checkpoint.
    """
    check = _Preflight(config)
    check.run_folder(resume, restarted)
    check.packages()
    check.documents()
    check.prompts()
    check.verifier()
    check.validation()
    check.model()
    check.engines()
    check.trainer()
    return [fault for fault in check.faults if not involves(fault, known_faulty)], check.warnings


class _Preflight:
    """Collects the faults and warnings of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.faults: list[Fault] = []
        self.warnings: list[str] = []

    def fault(self, keys: str, message: str) -> None:
        self.faults.append(Fault(tuple(keys.split()), message))

    def attempt(self, keys: str, action: Callable[[], Result]) -> Result | None:
        """The result of an action; if it raises a UserError, that is a fault of `keys`."""
        try:
            return action()
        except UserError as error:
            self.fault(keys, str(error))
            return None

    def run_folder(self, resume: Path | None, restarted: bool) -> None:
        run = self.config.run
        folder = run.output_dir / run.name
        has_checkpoint = (folder / "checkpoints" / "latest").exists()
        if resume is not None and not resume.is_dir():
            self.fault("run.name", f"there is no run in {resume}. Check the folder given to --resume")
        elif resume is not None and not has_checkpoint:
            self.fault(
                "run.name",
                f"the run in {folder} has no checkpoint to continue from. Remove the folder and start anew",
            )
        elif resume is None and holds_run(folder) and (has_checkpoint or not restarted):
            remedy = "continue that run with --resume" if has_checkpoint else "remove the folder"
            self.fault(
                "run.name run.output_dir",
                f"{folder} already holds a run. Choose another name with --run.name=…, or {remedy}",
            )
        existing = nearest_existing(folder)
        if not existing.is_dir():
            self.fault("run.output_dir run.name", f"{existing} is a file. Choose another output folder")
        elif not os.access(existing, os.W_OK):
            self.fault("run.output_dir", f"{existing} is not writable. Choose another folder")

    def packages(self) -> None:
        if self.config.logging.wandb and find_spec("wandb") is None:
            self.fault(
                "logging.wandb",
                "the wandb package is not installed. Install it (pip install wandb), or set this to false",
            )
        for package in ("torch", "megatron.core", "vllm"):
            if package == "vllm" and self.config.rollout.urls:
                continue
            try:
                found = find_spec(package) is not None
            except ModuleNotFoundError:
                found = False
            if not found:
                self.fault(
                    "run.device",
                    f"the package {package} is not installed in this Python. Install spell_megatron with the "
                    "extra 'cpu' (machines without a GPU) or 'gpu'",
                )

    def documents(self) -> None:
        config = self.config
        clusters = self.attempt("data.documents", lambda: load_clusters(config.data.documents))
        if clusters is None:
            return
        if not config.selfplay.questioner.enabled and not clusters[0].question:
            self.fault(
                "selfplay.questioner.enabled data.documents",
                f"there is to be no questioner, and {config.data.documents} has no questions. Give a file whose rows "
                "have task, question, answer and documents, or leave the questioner on",
            )
        sources = Counter(cluster.source for cluster in clusters)
        unknown = [source for source in config.data.sources if source not in sources]
        for source in unknown:
            close = difflib.get_close_matches(source, sources, 1)
            found = ", ".join(map(repr, sources))
            hint = f"Did you mean {close[0]!r}?" if close else f"The file has {found}."
            self.fault("data.sources", f"no cluster of {config.data.documents} has the source {source!r}. {hint}")
        if not unknown:
            self.attempt(
                "data.sources data.documents selfplay.tasks selfplay.clusters_per_round",
                lambda: ClusterSampler(
                    clusters,
                    config.selfplay.tasks,
                    config.data.sources,
                    config.selfplay.clusters_per_round,
                    config.run.seed,
                ),
            )
        reachable = config.selfplay.max_rounds * min(len(clusters), config.selfplay.clusters_per_round)
        if config.selfplay.groups > reachable:
            self.fault(
                "selfplay.groups data.documents selfplay.max_rounds",
                f"{config.selfplay.groups} mixed groups can never come from max_rounds = "
                f"{config.selfplay.max_rounds} rounds over {len(clusters)} clusters, which ask one question "
                f"each. Lower it to {reachable} or less, or add documents",
            )
        elif config.selfplay.groups > len(clusters):
            self.warnings.append(
                f"selfplay.groups = {config.selfplay.groups} is more than the {len(clusters)} document "
                "clusters, so that an update holds several questions about the same documents"
            )

    def prompts(self) -> None:
        self.attempt("selfplay.prompts", lambda: PromptSet.load(self.config.selfplay.prompts))

    def verifier(self) -> None:
        play = self.config.selfplay
        answers = play.groups * play.group_size
        if trains_verifier(self.config) and play.verifier.share * answers < play.votes:
            self.warnings.append(
                f"selfplay.verifier.share = {play.verifier.share:g} of the {answers} answers of an update is less than "
                f"one group of {play.votes} judgments, so the verifier is never trained. Raise it to "
                f"{math.ceil(100 * play.votes / answers) / 100:g} or more, or ask for more selfplay.groups"
            )

    def validation(self) -> None:
        questions = self.config.validation.questions
        if questions is not None:
            from spell_megatron.evaluation.questions import load_questions

            self.attempt("validation.questions", lambda: load_questions(questions))

    def model(self) -> None:
        config, path = self.config, self.config.model.path
        if not path.is_dir():
            kind = "is a file" if path.exists() else "does not exist"
            self.fault(
                "model.path",
                f"the folder {path} {kind}. Give the local folder of a Hugging Face checkpoint. Relative "
                "paths are taken from the current directory, then from the folder of the YAML file",
            )
            return
        for message in weight_file_faults(path):
            self.fault("model.path", message)

        # transformers takes seconds to import: not before the folder is known to exist
        from spell_megatron.tokenizer import PolicyTokenizer
        from spell_megatron.training.policy import PolicyModel

        policy = self.attempt("model.path", lambda: PolicyModel.load(path, config.model.dtype))
        tokenizer = None
        if policy is not None or not (path / "config.json").exists():  # it reads that file too
            tokenizer = self.attempt("model.path", lambda: PolicyTokenizer(path))
        if policy is None:
            return
        self.attempt("model.path", lambda: policy.rotary)
        arch = policy.arch
        if tokenizer is not None and tokenizer.vocab_size > arch.vocabulary:
            self.fault(
                "model.path",
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only "
                f"{arch.vocabulary}. Use the tokenizer that belongs to the model",
            )
        if not self.gpus() and not config.rollout.urls and arch.head_dim not in CPU_HEAD_SIZES:
            self.fault(
                "model.path",
                f"the model's attention heads have {arch.head_dim} dimensions, and vLLM's engines on CPUs "
                f"serve only {', '.join(map(str, CPU_HEAD_SIZES))}. Use another model, or a GPU",
            )
        self.lengths(policy.hf_config)
        self.layout(arch)

    def lengths(self, hf_config) -> None:
        from spell_megatron.rollout.engines import longest_sequence

        longest, limit = longest_sequence(self.config), position_limit(hf_config)
        if longest > limit:
            self.fault(
                "rollout.sampling.max_prompt_tokens rollout.sampling.max_response_tokens "
                "rollout.sampling.max_verdict_tokens rollout.sampling.max_no_context_tokens model.path",
                f"the longest prompt and response together, {longest} tokens, are more than the model's "
                f"{limit} positions. Lower max_prompt_tokens or max_response_tokens by {longest - limit}, or "
                "configure the model's rope scaling",
            )
        sampling, budget = self.config.rollout.sampling, self.config.training.tokens_per_microbatch
        if sampling.max_prompt_tokens + sampling.max_response_tokens > budget:
            self.warnings.append(
                f"training.tokens_per_microbatch = {budget} is less than the longest row, max_prompt_tokens "
                f"+ max_response_tokens = {sampling.max_prompt_tokens + sampling.max_response_tokens}: such "
                "a row is a microbatch of its own and may need more memory than you planned for"
            )

    def layout(self, arch) -> None:
        from spell_megatron.training.layout import layout_faults

        parallel, rollout = self.config.training.parallel, self.config.rollout
        self.faults += layout_faults(arch, parallel)
        if not rollout.urls and arch.heads % rollout.tensor_parallel:
            self.fault(
                "rollout.tensor_parallel model.path",
                f"{rollout.tensor_parallel} does not divide the model's {arch.heads} attention heads. Choose a divisor",
            )

    def engines(self) -> None:
        rollout = self.config.rollout
        seen: set[str] = set()
        for url in rollout.urls:
            if problem := url_problem(url):
                self.fault("rollout.urls", f"{url!r} {problem}. Write it as http://host:8000")
            if url.rstrip("/") in seen:
                self.fault("rollout.urls", f"{url!r} is listed twice. Remove one")
            seen.add(url.rstrip("/"))
        if rollout.base_port is not None and not rollout.urls:
            ports = range(rollout.base_port, min(rollout.base_port + rollout.replicas, 65536))
            taken = [str(port) for port in ports if not port_is_free(port)]
            if taken:
                self.fault(
                    "rollout.base_port rollout.replicas",
                    f"port {', '.join(taken)} is in use or not allowed. End the program that holds it, "
                    "choose another base_port, or leave it out to have free ports chosen",
                )

    def gpus(self) -> bool:
        """Whether the run would use GPUs."""
        if self.config.run.device == "cpu" or find_spec("torch") is None:
            return False
        import torch

        return torch.cuda.is_available()

    def trainer(self) -> None:
        config, gpus = self.config, self.gpus()
        if config.run.device == "cuda" and not gpus:
            self.fault(
                "run.device",
                "cuda is asked for, but torch sees no GPU here. Set run.device to cpu or auto, or check that "
                "`nvidia-smi` lists a GPU and that torch is a CUDA build",
            )
        elif not gpus and config.model.dtype == "bfloat16":
            self.warnings.append("model.dtype = bfloat16 is slow on CPUs; float32 is usually faster there")
        elif gpus and launched_processes() is None:
            import torch

            wanted, visible = config.training.parallel.processes, torch.cuda.device_count()
            if wanted > visible:
                self.fault(
                    "training.parallel.processes",
                    f"{wanted} trainer processes need a GPU each, and this machine shows {visible}. Lower it, or start "
                    "the processes on several machines with srun or torchrun",
                )
        processes = launched_processes()
        if processes not in (None, config.training.parallel.processes):
            self.warnings.append(
                f"training.parallel.processes = {config.training.parallel.processes} is not used: "
                f"{processes} processes were started from outside"
            )
        self.disk()

    def disk(self) -> None:
        needed = checkpoint_bytes(self.config.model.path)
        folder = self.config.run.output_dir.absolute()
        free = shutil.disk_usage(nearest_existing(folder)).free
        kept = self.config.checkpoint.keep
        message = (
            f"a checkpoint takes about {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} "
            "GB left. Free some space, or choose another output_dir"
        )
        if free < needed:
            self.fault("run.output_dir", message)
        elif free < (kept + 1) * needed:
            self.warnings.append(f"checkpoint.keep = {kept} may not fit: {message}")


def holds_run(folder: Path) -> bool:
    """Whether a run has left results here. Logs of engines that died at the start are none."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def weight_file_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the safetensors files of a checkpoint, from their headers alone."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{index} is not an index of safetensors files ({error!r}). Copy the checkpoint again"
            return
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield (
            f"the checkpoint {folder} lacks {missing[0]}{more}. Only safetensors are read: copy the whole "
            "checkpoint, or convert it with transformers' save_pretrained"
        )
    for name in names:
        if name not in missing:
            try:
                with safe_open(str(folder / name), framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                yield f"{folder / name} is not a complete safetensors file ({error}). Copy it again"


def checkpoint_bytes(model: Path) -> int:
    """About the size of one checkpoint of a run that begins with this model.

    The weights twice (trainer and Hugging Face), and for the optimizer 12 bytes a parameter (float32
    master weight and two moments). 0 if there are no readable weights.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="numpy") as file:
                parameters = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        except (SafetensorError, OSError):
            continue
        total += 2 * path.stat().st_size + 12 * parameters
    return total


def position_limit(hf_config) -> int:
    """Tokens that a model may see at a time, as vLLM counts them.

    A linear rope scaling multiplies max_position_embeddings; for yarn and llama3 it holds the extended
    length already.
    """
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    factor = parameters["factor"] if parameters.get("rope_type") == "linear" else 1.0
    return int(hf_config.max_position_embeddings * factor)


def url_problem(url: str) -> str | None:
    """What is wrong with an engine's address; None if nothing."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is not an address ({error})"
    if parts.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    if not parts.hostname:
        return "names no host"
    if port == 0:
        return "has no usable port"
    if parts.path.strip("/") or parts.query or parts.fragment:
        return "has a path after the host, which the run adds itself"
    return None


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1."""
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
