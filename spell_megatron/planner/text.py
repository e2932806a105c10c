"""A plan in words."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spell_megatron.config.schema import Config
from spell_megatron.planner.gpus import Assumptions
from spell_megatron.planner.memory import Model, engine_memory, row_tokens
from spell_megatron.planner.search import Plan

GIB = 2**30


def describe(plan: Plan) -> str:
    """A layout in one line: sizes above 1, data-parallel replicas, recompute and offload."""
    parallel = plan.parallel
    sizes = [
        f"{name} {getattr(parallel, name)}"
        for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")
        if getattr(parallel, name) > 1
    ]
    replicas = plan.processes // parallel.dense_ranks
    return ", ".join([*sizes, f"data {replicas}", f"recompute {plan.recompute}", *["offload"] * plan.offload])


def plan_text(model: Model, config: Config, plan: Plan, name: str, assume: Assumptions) -> Iterator[str]:
    """The plan in lines of text; `name` is the GPU's."""
    arch, sampling, gpu = model.arch, config.rollout.sampling, plan.gpu
    count = model.parameters
    idle = model.expert_parameters * (1 - arch.experts_per_token / arch.experts) if arch.experts else 0
    at_work = f", {(count - idle) / 1e9:.2f} billion at work per token" if idle else ""
    yield f"model     {count:,} parameters{at_work}"
    rows = f"rows of up to {row_tokens(config):,} tokens"
    yield f"trainer   {plan.processes} x {name}: {describe(plan)}; {rows}"
    notes = {
        "parameters": "counted on a rank of the real model",
        "gradients": "counted; float32",
        "optimizer": "counted; AdamW" + (" with float32 weights" if config.model.dtype == "bfloat16" else ""),
        "activations": "formula for the plain-torch layers, routing balanced",
        "layer": "formula: gradients of the layer at work, and what is computed again",
        "head": "formula: the vocabulary head at work, in turn with the layer: the larger one counts",
        "step": "torch's AdamW at work, when the three above are gone",
        "buffers": "weights on their way to the engines",
        "reserve": "assumed: CUDA context, NCCL, workspaces",
    }
    for part, note in notes.items():
        yield f"  {part:12} {getattr(plan.memory, part) / GIB:8.2f} GiB   {note}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    room = f"of {gpu.memory / GIB:.2f} on the fullest rank: {verdict}"
    yield f"  {'total':12} {plan.memory.total / GIB:8.2f} GiB   {room}"
    if plan.offload:
        host = plan.memory.host / GIB
        node = min(assume.gpus_per_node, plan.processes)
        yield f"  {'host':12} {host:8.2f} GiB   of pinned host memory; {node * host:.2f} on a node of {node} such ranks"
    engine = engine_memory(model, config, gpu, assume)
    yield f"engines   {config.rollout.replicas} x {config.rollout.tensor_parallel} {name}"
    yield f"  {'weights':12} {engine.weights / GIB:8.2f} GiB   per GPU"
    yield (
        f"  {'KV cache':12} {engine.kv_cache / GIB:8.2f} GiB   {engine.kv_per_token / 1024:.1f} KiB per token and GPU: "
        f"{engine.sequences:.1f} sequences of the longest length, more where prompts are shared"
    )
    times = plan.times
    yield (
        f"step      about {_duration(times.step)}: rollout {_duration(times.prefill + times.decode)} "
        f"(prefill {_duration(times.prefill)}, decoding {_duration(times.decode)}), update {_duration(times.update)} "
        f"(computing {_duration(times.compute)}, exchanging {_duration(times.communication)}, pipeline waiting "
        f"{_duration(times.bubble)}), weights to the engines {_duration(times.refit)}"
    )
    yield (
        f"assumed   prompts of {assume.prompt * sampling.max_prompt_tokens:,.0f} and responses of "
        f"{assume.response * sampling.max_response_tokens:,.0f} tokens (judgments of "
        f"{assume.verdict * (sampling.max_verdict_tokens or sampling.max_response_tokens):,.0f}), "
        f"{assume.mixed:.0%} of the questions mixed; "
        f"{assume.matrix_efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s, {assume.memory_efficiency:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s in decoding, {assume.link_efficiency:.0%} of {gpu.link / 1e9:.0f} GB/s in "
        f"nodes of {assume.gpus_per_node} and {assume.network / 1e9:.0f} GB/s between them"
        f"{f', {assume.host / 1e9:.0f} GB/s to the host' if plan.offload else ''}, nothing overlapped"
    )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "for ever"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
