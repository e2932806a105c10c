"""What can be known to go wrong before any model is loaded: files, the model's limits, ports, disks.

`spell_megatron.config` checks the settings by themselves; this module checks them against the machine. It writes
nothing and loads no weights.
"""

from __future__ import annotations

import difflib
import math
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from spell_megatron.config.faults import Fault, involves
from spell_megatron.config.relations import trains_verifier
from spell_megatron.config.schema import Config, RolloutConfig, RunConfig
from spell_megatron.errors import UserError
from spell_megatron.ranks import launched_processes
from spell_megatron.selfplay.documents import Cluster, load_clusters
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler

if TYPE_CHECKING:
    from spell_megatron.training.policy import Architecture, PolicyModel

Result = TypeVar("Result")

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM serves on CPUs. With another size it dies at the first request."""


@dataclass
class Findings:
    """Faults and warnings about a configuration on this machine."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def fault(self, keys: str, message: str) -> None:
        """Note a fault of dotted keys, separated by spaces."""
        self.faults.append(Fault.of(keys, message))

    def warn(self, message: str) -> None:
        """Note what may go wrong."""
        self.warnings.append(message)

    def attempt(self, keys: str, action: Callable[[], Result]) -> Result | None:
        """The result of an action; if it raises a UserError, that is a fault of `keys`."""
        try:
            return action()
        except UserError as error:
            self.fault(keys, str(error))
            return None


def inspect(
    config: Config, resume: Path | None = None, known_faulty: Collection[str] = (), restarted: bool = False
) -> Findings:
    """Check a configuration against this machine.

    Args:
        resume: folder of the run to be continued.
        known_faulty: keys that are known to be wrong already; faults that involve them are left out.
        restarted: Slurm has queued the job again, which was ended before its first checkpoint, so that the run's
            folder may hold results.
    """
    found = Findings()
    check_run_folder(found, config.run, resume, restarted)
    check_packages(found, config)
    clusters = found.attempt("data.documents", lambda: load_clusters(config.data.documents))
    if clusters is not None:
        check_documents(found, config, clusters)
    found.attempt("selfplay.prompts", lambda: PromptSet.load(config.selfplay.prompts))
    check_verifier(found, config)
    check_held_out_questions(found, config.validation.questions)
    policy = check_model_folder(found, config.model.path, config.model.dtype)
    if policy is not None:
        found.attempt("model.path", lambda: policy.rotary)
        check_lengths(found, config, policy)
        check_heads(found, config, policy.arch)
    check_engine_urls(found, config.rollout.urls)
    check_ports(found, config.rollout)
    check_trainer(found, config)
    if policy is not None:
        check_disk(found, config, policy)
    found.faults = [fault for fault in found.faults if not involves(fault, known_faulty)]
    return found


def check_run_folder(found: Findings, run: RunConfig, resume: Path | None, restarted: bool) -> None:
    """The run's folder is new or continued, and can be written."""
    folder = run.output_dir / run.name
    has_checkpoint = (folder / "checkpoints" / "latest").exists()
    if resume is not None and not resume.is_dir():
        found.fault("run.name", f"there is no run in {resume}. Check the folder given to --resume")
    elif resume is not None and not has_checkpoint:
        found.fault(
            "run.name",
            f"the run in {folder} has no checkpoint to continue from. Remove the folder and start without --resume",
        )
    elif resume is None and holds_run(folder) and (has_checkpoint or not restarted):
        remedy = "continue that run with --resume" if has_checkpoint else "remove the folder"
        found.fault(
            "run.name run.output_dir",
            f"{folder} already holds a run. Choose another name with --run.name=…, or {remedy}",
        )
    existing = nearest_existing(folder)
    if not existing.is_dir():
        found.fault("run.output_dir run.name", f"{existing} is a file. Choose another output folder")
    elif not os.access(existing, os.W_OK):
        found.fault("run.output_dir", f"{existing} is not writable. Choose another folder")


def check_packages(found: Findings, config: Config) -> None:
    """The packages that the run needs are installed."""
    if config.logging.wandb and not is_installed("wandb"):
        found.fault(
            "logging.wandb",
            "the wandb package is not installed. Install it (pip install wandb), or set this to false",
        )
    for package in ("torch", "megatron.core", *(() if config.rollout.urls else ("vllm",))):
        if not is_installed(package):
            found.fault(
                "run.device",
                f"the package {package} is not installed in this Python. Install spell_megatron with the "
                "extra 'cpu' (machines without a GPU) or 'gpu'",
            )


def check_documents(found: Findings, config: Config, clusters: Sequence[Cluster]) -> None:
    """The document clusters have what the tasks need, and are enough."""
    play, file = config.selfplay, config.data.documents
    if not play.questioner.enabled and not clusters[0].question:
        found.fault(
            "selfplay.questioner.enabled data.documents",
            f"the questioner is off, and {file} has no questions. Give a file whose rows have task, question, answer "
            "and documents, or turn the questioner on",
        )
    sources = Counter(cluster.source for cluster in clusters)
    unknown = [source for source in config.data.sources if source not in sources]
    for source in unknown:
        close = difflib.get_close_matches(source, sources, 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"The file has {', '.join(map(repr, sources))}."
        found.fault("data.sources", f"no cluster of {file} has the source {source!r}. {hint}")
    if not unknown:
        found.attempt(
            "data.sources data.documents selfplay.tasks selfplay.clusters_per_round",
            lambda: ClusterSampler(clusters, play.tasks, config.data.sources, play.clusters_per_round, config.run.seed),
        )
    reachable = play.max_rounds * min(len(clusters), play.clusters_per_round)
    if play.groups > reachable:
        found.fault(
            "selfplay.groups data.documents selfplay.max_rounds",
            f"a step asks one question per cluster, and max_rounds = {play.max_rounds} rounds over {len(clusters)} "
            f"clusters can never come to {play.groups} mixed groups. Lower it to {reachable} or less, or add documents",
        )
    elif play.groups > len(clusters):
        found.warn(
            f"selfplay.groups = {play.groups} is more than the {len(clusters)} document "
            "clusters, so an update holds several questions about the same documents"
        )


def check_verifier(found: Findings, config: Config) -> None:
    """An update has room for a group of judgments."""
    play = config.selfplay
    answers = play.groups * play.group_size
    if trains_verifier(config) and play.verifier.share * answers < play.votes:
        found.warn(
            f"selfplay.verifier.share = {play.verifier.share:g} of the {answers} answers of an update is less than "
            f"one group of {play.votes} judgments, so the verifier is never trained. Raise it to "
            f"{math.ceil(100 * play.votes / answers) / 100:g} or more, or ask for more selfplay.groups"
        )


def check_held_out_questions(found: Findings, questions: Path | None) -> None:
    """The file of held-out questions can be read."""
    if questions is not None:
        from spell_megatron.evaluation.questions import load_questions

        found.attempt("validation.questions", lambda: load_questions(questions))


def check_model_folder(found: Findings, path: Path, dtype: str) -> PolicyModel | None:
    """Configuration, weights and tokenizer are complete; what config.json says, or None if it cannot be used."""
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        found.fault(
            "model.path",
            f"the folder {path} {kind}. Give the local folder of a Hugging Face checkpoint. Relative "
            "paths are taken from the current directory, then from the folder of the YAML file",
        )
        return None
    # transformers takes seconds to import: not before the folder is known to exist
    from spell_megatron.tokenizer import PolicyTokenizer
    from spell_megatron.training.policy import PolicyModel
    from spell_megatron.weights.weight_files import weight_file_faults

    for message in weight_file_faults(path):
        found.fault("model.path", message)

    policy = found.attempt("model.path", lambda: PolicyModel.load(path, dtype))
    tokenizer = None
    if policy is not None or not (path / "config.json").exists():  # it reads that file too
        tokenizer = found.attempt("model.path", lambda: PolicyTokenizer(path))
    if policy is not None and tokenizer is not None and tokenizer.vocab_size > policy.arch.vocabulary:
        found.fault(
            "model.path",
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only "
            f"{policy.arch.vocabulary}. Use the tokenizer that belongs to the model",
        )
    return policy


def check_lengths(found: Findings, config: Config, policy: PolicyModel) -> None:
    """Prompts and responses fit the model's positions and a microbatch."""
    longest, limit = config.rollout.sampling.longest_sequence, position_limit(policy.hf_config)
    if longest > limit:
        found.fault(
            "rollout.sampling.max_prompt_tokens rollout.sampling.max_response_tokens "
            "rollout.sampling.max_verdict_tokens rollout.sampling.max_no_context_tokens model.path",
            f"the longest prompt and response together, {longest} tokens, are more than the model's "
            f"{limit} positions. Lower max_prompt_tokens or max_response_tokens by {longest - limit}, or "
            "configure the model's rope scaling",
        )
    sampling, budget = config.rollout.sampling, config.training.tokens_per_microbatch
    if sampling.max_prompt_tokens + sampling.max_response_tokens > budget:
        found.warn(
            f"training.tokens_per_microbatch = {budget} is less than the longest row, max_prompt_tokens "
            f"+ max_response_tokens = {sampling.max_prompt_tokens + sampling.max_response_tokens}. Such a row is a "
            "microbatch of its own and may need more memory than you planned for"
        )


def check_heads(found: Findings, config: Config, arch: Architecture) -> None:
    """Trainer and engines can divide the model, and the engines serve its size of attention heads."""
    from spell_megatron.training.layout import layout_faults

    rollout = config.rollout
    if not rollout.urls and not uses_gpus(config) and arch.head_dim not in CPU_HEAD_SIZES:
        found.fault(
            "model.path",
            f"the model's attention heads have {arch.head_dim} dimensions, and vLLM's engines on CPUs "
            f"serve only {', '.join(map(str, CPU_HEAD_SIZES))}. Use another model, or a GPU",
        )
    found.faults += layout_faults(arch, config.training.parallel)
    if not rollout.urls and arch.heads % rollout.tensor_parallel:
        found.fault(
            "rollout.tensor_parallel model.path",
            f"{rollout.tensor_parallel} does not divide the model's {arch.heads} attention heads. Choose a divisor",
        )


def check_engine_urls(found: Findings, urls: Sequence[str]) -> None:
    """Addresses of running engines are addresses, each listed once."""
    seen: set[str] = set()
    for url in urls:
        if problem := url_problem(url):
            found.fault("rollout.urls", f"{url!r} {problem}. Write it as http://host:8000")
        if url.rstrip("/") in seen:
            found.fault("rollout.urls", f"{url!r} is listed twice. Remove one")
        seen.add(url.rstrip("/"))


def check_ports(found: Findings, rollout: RolloutConfig) -> None:
    """The ports of the engines to be started are free."""
    if rollout.base_port is None or rollout.urls:
        return
    ports = range(rollout.base_port, min(rollout.base_port + rollout.replicas, 65536))
    if taken := [str(port) for port in ports if not port_is_free(port)]:
        found.fault(
            "rollout.base_port rollout.replicas",
            f"port {', '.join(taken)} is in use or not allowed. End the program that holds it, choose another "
            "base_port, or leave it out, so that the run chooses free ports",
        )


def check_trainer(found: Findings, config: Config) -> None:
    """The trainer's device exists, with a GPU for each process."""
    gpus, launched, processes = uses_gpus(config), launched_processes(), config.training.parallel.processes
    if config.run.device == "cuda" and not gpus:
        found.fault(
            "run.device",
            "this is cuda, but torch sees no GPU here. Set run.device to cpu or auto, or check that "
            "`nvidia-smi` lists a GPU and that torch is a CUDA build",
        )
    elif not gpus and config.model.dtype == "bfloat16":
        found.warn("model.dtype = bfloat16 is slow on CPUs; float32 is usually faster there")
    elif gpus and launched is None:
        import torch

        if processes > (visible := torch.cuda.device_count()):
            found.fault(
                "training.parallel.processes",
                f"{processes} trainer processes need a GPU each, and this machine shows {visible}. Lower it, or start "
                "the processes on several machines with srun or torchrun",
            )
    if launched not in (None, processes):
        found.warn(
            f"training.parallel.processes = {processes} is not used: {launched} processes were started from outside"
        )


def check_disk(found: Findings, config: Config, policy: PolicyModel) -> None:
    """The disk has room for the checkpoints."""
    from spell_megatron.weights.sizes import checkpoint_bytes

    needed, kept = checkpoint_bytes(policy), config.checkpoint.keep
    folder = config.run.output_dir.absolute()
    free = shutil.disk_usage(nearest_existing(folder)).free
    message = (
        f"a checkpoint takes about {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} "
        "GB left. Free some space, or choose another output_dir"
    )
    if free < needed:
        found.fault("run.output_dir", message)
    elif free < (kept + 1) * needed:
        found.warn(f"checkpoint.keep = {kept} may not fit: {message}")


def is_installed(package: str) -> bool:
    """Whether Python finds a package, which is not imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False


def uses_gpus(config: Config) -> bool:
    """Whether the run would use GPUs."""
    if config.run.device == "cpu" or not is_installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def holds_run(folder: Path) -> bool:
    """Whether a run has left results here. Logs of engines that died at the start are none."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def position_limit(hf_config: Any) -> int:
    """Number of tokens that a model accepts in a sequence, as vLLM counts them.

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
