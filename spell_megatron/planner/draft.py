"""Settings of a new run for a model, a corpus and the hardware at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spell_megatron.config.reading import read_config
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.hub import name_of
from spell_megatron.planner.gpus import GPUS, Assumptions, Gpu
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import Plan
from spell_megatron.planner.search import fastest, fewest
from spell_megatron.planner.text import duration
from spell_megatron.preflight.engine_model import position_limit
from spell_megatron.preflight.prompt_lengths import PromptLengths
from spell_megatron.preflight.token_counts import document_tokens
from spell_megatron.selfplay.documents import Cluster, load_clusters
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.tokenizer import PolicyTokenizer
from spell_megatron.training.policy import PolicyModel

_QUESTION = 128
"""Tokens that a question may take in the responder's prompt."""
_FEW_CLUSTERS = 30
"""With fewer of them a run has one task: each task needs clusters of its own."""


@dataclass(frozen=True)
class Hardware:
    """What a run has. `gpu` None: no GPU."""

    gpu: Gpu | None
    gpus: int = 0
    per_node: int = 8
    host_memory: float | None = None
    """Bytes of memory of a node; None: what is usual for the GPU."""

    def __str__(self) -> str:
        return f"{self.gpus} x {self.gpu.name}" if self.gpu else "CPUs"


@dataclass(frozen=True)
class Draft:
    """Settings by dotted key, and what a user should know of them."""

    settings: dict[str, Any]
    remarks: list[str]


def hardware_here(per_node: int) -> Hardware:
    """The GPUs of this machine, if it has any. Of a kind that the planner does not know, the memory alone is known."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return Hardware(None)
    name, memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
    similar = next(
        (gpu for known, gpu in GPUS.items() if known.split("-")[0] in "".join(name.split())), GPUS["A100-80G"]
    )
    count = torch.cuda.device_count()
    gpu, host = replace(similar, name=name, memory=memory), psutil.virtual_memory().total
    return Hardware(gpu, count, min(per_node, count), host)


def draft(model: Path, documents: Path, hardware: Hardware, overrides: Sequence[str]) -> Draft:
    """Settings for a run of the model on the documents.

    Args:
        overrides: `key=value` of the user, which come before all that is chosen here.

    Raises:
        UserError: model or documents cannot be used, or nothing fits the hardware.
    """
    policy, tokenizer, clusters = PolicyModel.load(model), PolicyTokenizer(model), load_clusters(documents)
    settings: dict[str, Any] = {
        "run.steps": 70 if hardware.gpu else 12,
        "run.device": "cuda" if hardware.gpu else "cpu",
        "model.path": str(model.absolute()),
        # engines compute linear-attention layers in bfloat16 only
        "model.dtype": "bfloat16" if hardware.gpu or policy.arch.delta_net else "float32",
        "data.documents": str(documents.absolute()),
        "checkpoint.every": 10 if hardware.gpu else 6,
        "training.optimizer.lr": 2e-6,
    }
    given = {word.lstrip("-").partition("=")[0] for word in overrides}
    settings |= _sizes(len(clusters), hardware)
    remarks = _add_limits(settings, policy, tokenizer, clusters, hardware, overrides)
    config = _config(settings, overrides)
    if hardware.gpu:
        plan = _fastest(policy, config, hardware, hardware.gpu, fixed="training.tokens_per_microbatch" in given)
        settings |= _of_plan(plan)
        memory, used = plan.gpu.memory / 2**30, plan.fullest.total / 2**30
        remarks.append(
            f"By `spell plan` a step takes about {duration(plan.times.step)}, and a GPU's memory is used up to "
            f"{used:.1f} of {memory:.1f} GiB. This was not measured."
        )
    chosen = _config(settings, overrides)
    settings["model.path"] = name_of(model.absolute())
    flat = chosen.model_dump(mode="json")
    return Draft(settings | {key: _value(flat, key) for key in given}, remarks)


def _config(settings: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    return read_config(None, [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *overrides]).checked()


def _value(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def _sizes(clusters: int, hardware: Hardware) -> dict[str, Any]:
    """How much a step does."""
    groups = max(1, min(128 if hardware.gpus >= 8 else 16 * hardware.gpus if hardware.gpu else 8, clusters))
    sizes: dict[str, Any] = {
        "selfplay.groups": groups,
        "selfplay.group_size": 8,
        "selfplay.clusters_per_round": max(1, min(480, 4 * groups, clusters)),
    }
    if clusters < _FEW_CLUSTERS:
        sizes["selfplay.tasks"] = {"doc_general_qa": 1.0}
    if groups < 8:  # else no judgments would be trained on
        sizes["selfplay.verifier.share"] = round(1 / groups + 0.005, 2)
    if not hardware.gpu:
        threads = min(4, os.cpu_count() or 1)
        sizes |= {"rollout.threads": threads, "training.threads": threads, "rollout.concurrency": 64}
    return sizes


def _add_limits(
    settings: dict[str, Any],
    policy: PolicyModel,
    tokenizer: PolicyTokenizer,
    clusters: Sequence[Cluster],
    hardware: Hardware,
    overrides: Sequence[str],
) -> list[str]:
    """Add the limits of prompts and responses to the settings: as the clusters need, and the positions allow."""
    positions = position_limit(policy.hf_config)[0]
    response = min(4096 if hardware.gpu else 256, max(1, positions // 8))
    settings["rollout.sampling.max_response_tokens"] = response
    config = _config(settings, overrides)
    response, play = config.rollout.sampling.max_response_tokens, config.selfplay
    prompts = PromptSet.load(play.prompts, play.questioner.quotes)
    lengths = PromptLengths(config, prompts, tokenizer)
    tokens = document_tokens(config.data.documents, [c.documents for c in clusters], tokenizer, config.model.path)
    tasks = [task for task, share in play.tasks.items() if share > 0]
    needed = [
        max(lengths.needed(task, cluster, counts) for task in tasks)
        for cluster, counts in zip(clusters, tokens, strict=True)
    ]
    room = positions - response
    if (least := max(lengths.instructions(role, task) for role in lengths.roles for task in tasks)) > room:
        raise UserError(
            f"The instructions of the prompt set {play.prompts!r} take {least} tokens without any document, and the "
            f"model has positions for prompts of up to {room}. Give it shorter ones (--selfplay.prompts=compact, for a "
            "model that was taught on them), or take a model for longer contexts."
        )
    wanted = -(-(max(needed) + _QUESTION) // 64) * 64
    limit = min(wanted, room)
    settings["rollout.sampling.max_prompt_tokens"] = limit
    settings["training.tokens_per_microbatch"] = max(limit + response, 32768 if hardware.gpu else 4096)
    long = sum(n + _QUESTION > limit for n in needed)
    if long == len(needed):
        left = max(1, room - max(lengths.instructions("responder", task, 8) for task in tasks) - _QUESTION)
        raise UserError(
            f"All {long} clusters of {config.data.documents} are too long for the {positions} positions of the model. "
            f"Prepare shorter ones: spell prepare … --max-cluster-tokens {left} --tokenizer {config.model.path}"
        )
    if long:
        said = "are too long for the model's positions. Questions about them are dropped."
        return [f"{long} of {len(needed)} clusters {said}"]
    return []


def _fastest(policy: PolicyModel, config: Config, hardware: Hardware, gpu: Gpu, fixed: bool) -> Plan:
    """The fastest plan that fits, with trainer and engines in turn or apart.

    Where none does, the trainer's rows become only as long as the longest response with its prompt, unless their length
    is `fixed`.
    """
    model, assume = ModelSize.of(policy), Assumptions(hardware.per_node, hardware.host_memory)
    if config.training.staleness:
        ways: tuple[bool, ...] = (False,)  # trainer and engines work at the same time
    else:
        ways = (True, False) if hardware.gpus > 1 else (True,)
    sampling = config.rollout.sampling
    shortest = sampling.max_prompt_tokens + sampling.max_response_tokens
    for tokens in (config.training.tokens_per_microbatch, *(() if fixed else (shortest,))):
        training = config.training.model_copy(update={"tokens_per_microbatch": tokens})
        config = config.model_copy(update={"training": training})
        plans = [plan for way in ways if (plan := fastest(model, config, hardware.gpus, way, gpu, assume))]
        if plans:
            return min(plans, key=lambda plan: plan.times.step)
    least = fewest(model, config, ways[0], gpu, assume)
    enough = f"{least.gpus} would do" if least else "no number of them would do"
    sharing = " With training.staleness: 0 trainer and engines can share GPUs." if config.training.staleness else ""
    raise UserError(
        f"The run does not fit {hardware}: {enough}. Take more or larger GPUs, a smaller model, shorter clusters "
        "(spell prepare … --max-cluster-tokens), or a machine with more memory; `spell plan` says what is short."
        f"{sharing}"
    )


def _of_plan(plan: Plan) -> dict[str, Any]:
    """The settings that the planner chose, where they are not the defaults."""
    training, rollout = plan.config.training, plan.config.rollout
    sizes = training.parallel.model_dump()
    settings = {f"training.parallel.{name}": size for name, size in sizes.items() if size > 1 or name == "processes"}
    settings |= {"rollout.replicas": rollout.replicas, "rollout.tensor_parallel": rollout.tensor_parallel}
    settings |= {"rollout.colocated": rollout.colocated}
    if training.recompute != "none":
        settings["training.recompute"] = training.recompute
    if training.offload:
        settings["training.offload"] = True
    if training.optimizer.offload:
        settings["training.optimizer.offload"] = True
    if not training.optimizer.distributed:
        settings["training.optimizer.distributed"] = False
    settings["training.tokens_per_microbatch"] = training.tokens_per_microbatch
    return settings
