"""A plan as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spell_megatron.config.schema import Config
from spell_megatron.planner.activations import row_tokens
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import TrainerMemory, engine_memory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.search import Plan
from spell_megatron.planner.times import StepTimes, assumed_lengths

GIB = 2**30


def plan_text(model: ModelSize, config: Config, plan: Plan, gpu_name: str, assume: Assumptions) -> Iterator[str]:
    """The plan in lines of text."""
    active = f", {model.active_parameters / 1e9:.2f} billion active per token" if model.arch.experts else ""
    yield f"model     {model.parameters.all:,} parameters{active}"
    rows = f"rows of up to {row_tokens(config):,} tokens"
    yield f"trainer   {plan.processes} x {gpu_name}: {describe_layout(plan)}; {rows}"
    yield from _trainer_lines(plan, config, assume)
    yield f"engines   {config.rollout.replicas} x {config.rollout.tensor_parallel} {gpu_name}"
    yield from _engine_lines(model, config, plan.gpu, assume)
    yield _step_line(plan.times)
    yield _assumptions_line(config, plan, assume)


def proposal_text(plan: Plan, best: Plan | None) -> str:
    """The line that proposes the `best` other layout instead of the plan's; None: no other one fits."""
    if best is None:
        return f"proposal  no layout on {plan.processes} GPUs fits: use more of them, or shorter rows"
    if plan.fits and best.times.update >= plan.times.update:
        return "proposal  none: no other layout is faster and fits"
    return (
        f"proposal  {describe_layout(best)}: {best.memory.total / GIB:.2f} GiB, updates "
        f"{plan.times.update / best.times.update:.2f} times as fast"
    )


def describe_layout(plan: Plan) -> str:
    """A layout in one line: sizes above 1, data-parallel replicas, recompute and offload."""
    parallel = plan.parallel
    sizes = [
        f"{name} {getattr(parallel, name)}"
        for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")
        if getattr(parallel, name) > 1
    ]
    replicas = plan.processes // parallel.dense_ranks
    return ", ".join([*sizes, f"data {replicas}", f"recompute {plan.recompute}", *["offload"] * plan.offload])


def _gib(label: str, nbytes: float, note: str) -> str:
    return f"  {label:12} {nbytes / GIB:8.2f} GiB   {note}"


def _trainer_lines(plan: Plan, config: Config, assume: Assumptions) -> Iterator[str]:
    memory: TrainerMemory = plan.memory
    master = " with float32 weights" if config.model.dtype == "bfloat16" else ""
    yield _gib("parameters", memory.parameters, "counted on a rank of the real model")
    yield _gib("gradients", memory.gradients, "counted; float32")
    yield _gib("optimizer", memory.optimizer, f"counted; AdamW{master}")
    yield _gib("activations", memory.activations, "formula for the plain-torch layers; balanced routing")
    yield _gib("layer", memory.layer, "formula: gradients of one layer, and its activations computed again")
    yield _gib("head", memory.head, "formula: the vocabulary head; only the larger of layer and head counts")
    yield _gib("step", memory.step, "torch's AdamW; counts only if it is more than the three above together")
    yield _gib("buffers", memory.buffers, "weights on their way to the engines")
    yield _gib("reserve", memory.reserve, "assumed: CUDA context, NCCL, workspaces")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield _gib("total", memory.total, f"of {plan.gpu.memory / GIB:.2f} on the fullest rank: {verdict}")
    if plan.offload:
        node = min(assume.gpus_per_node, plan.processes)
        yield _gib(
            "host",
            memory.host,
            f"of pinned host memory; {node * memory.host / GIB:.2f} on a node of {node} such ranks",
        )


def _engine_lines(model: ModelSize, config: Config, gpu: Gpu, assume: Assumptions) -> Iterator[str]:
    engine = engine_memory(model, config, gpu, assume)
    yield _gib("weights", engine.weights, "per GPU")
    yield _gib(
        "KV cache",
        engine.kv_cache,
        f"{engine.kv_per_token / 1024:.1f} KiB per token and GPU: {engine.sequences:.1f} sequences of the longest "
        "length, more where prompts are shared",
    )


def _step_line(times: StepTimes) -> str:
    return (
        f"step      about {_duration(times.step)}: rollout {_duration(times.prefill + times.decode)} "
        f"(prefill {_duration(times.prefill)}, decoding {_duration(times.decode)}), update {_duration(times.update)} "
        f"(computing {_duration(times.compute)}, communication {_duration(times.communication)}, pipeline bubbles "
        f"{_duration(times.bubble)}), weights to the engines {_duration(times.refit)}"
    )


def _assumptions_line(config: Config, plan: Plan, assume: Assumptions) -> str:
    lengths, gpu = assumed_lengths(config, assume), plan.gpu
    host = f", {assume.host / 1e9:.0f} GB/s to the host" if plan.offload else ""
    return (
        f"assumed   prompts of {lengths.prompt:,.0f} tokens, responses of {lengths.response:,.0f}, judgments of "
        f"{lengths.verdict:,.0f}; {assume.mixed:.0%} of the questions mixed; "
        f"{assume.matrix_efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s, {assume.memory_efficiency:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s in decoding, {assume.link_efficiency:.0%} of {gpu.link / 1e9:.0f} GB/s in "
        f"nodes of {assume.gpus_per_node} and {assume.network / 1e9:.0f} GB/s between them{host}; nothing overlaps"
    )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "for ever"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
