"""A plan as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spell_megatron.planner.activations import row_tokens
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import Plan
from spell_megatron.planner.times import StepTimes, assumed_lengths
from spell_megatron.plural import counted

GIB = 2**30


def plan_text(model: ModelSize, plan: Plan) -> Iterator[str]:
    """The plan in lines of text."""
    rollout = plan.config.rollout
    active = f", {model.active_parameters / 1e9:.2f} billion active per token" if model.arch.experts else ""
    yield f"model     {model.parameters.all:,} parameters{active}"
    rows = f"rows of up to {row_tokens(plan.config):,} tokens"
    yield f"trainer   {plan.processes} x {plan.gpu.name}: {describe_trainer(plan)}; {rows}"
    yield from _trainer_lines(plan)
    where = "on the trainer's GPUs, in turn with it" if rollout.colocated else plan.gpu.name
    yield f"engines   {rollout.replicas} x {rollout.tensor_parallel} {where}"
    yield from _engine_lines(plan)
    yield f"memory    of the fullest {'GPU' if rollout.colocated else 'GPU of the trainer'} at the peak of each phase"
    yield from _phase_lines(plan)
    yield from _host_lines(plan)
    yield _step_line(plan.times, plan.config.training.staleness)
    yield _assumptions_line(plan)
    yield f"limits    {limits_text(plan)}"


def limits_text(plan: Plan) -> str:
    """What is short, or would be first, and the rest in the order of how much is left."""
    host, memory = plan.host.total / plan.host_memory, plan.gpu.memory
    # Engines fill what generation leaves: there the room for sequences tells.
    phase = max(plan.phases, key=lambda phase: phase.total * (phase.name != "generate" or phase.total > memory))
    room = (memory - phase.total) / GIB
    sequences = max(plan.engine.sequences, 1e-9)
    found = [
        (
            phase.total / memory,
            f"GPU memory ({phase.name} {'leaves' if room >= 0 else 'lacks'} {abs(room):.1f} GiB)",
        ),
        (1 / sequences, f"KV cache (room for {plan.engine.sequences:.1f} sequences of the longest length per engine)"),
        (host, f"host memory ({plan.host.total / GIB:,.0f} of {plan.host_memory / GIB:,.0f} GiB of a node)"),
    ]
    return ", then ".join(text for _, text in sorted(found, reverse=True))


def proposal_text(plan: Plan, proposals: dict[str, Plan | None], smallest: dict[str, Plan | None]) -> Iterator[str]:
    """Lines with other plans on the same number of GPUs, and with the fewest GPUs.

    Args:
        proposals: the fastest plan that fits, by where trainer and engines are; None: none fits.
        smallest: the same, on the fewest GPUs.
    """
    for where, best in proposals.items():
        label = f"{'proposal' if where == next(iter(proposals)) else '':10}{where:10}"
        if best is None:
            yield f"{label}nothing fits {counted(plan.gpus, 'GPU')}"
        elif plan.fits and best.times.step > 0.99 * plan.times.step:
            yield f"{label}nothing that fits is faster"
        else:
            faster = f", {plan.times.step / best.times.step:.2f} times as fast" if plan.fits else ""
            yield f"{label}{_describe(best)}{faster}"
    for where, least in smallest.items():
        label = f"{'fewest' if where == next(iter(smallest)) else '':10}{where:10}"
        found = f"{counted(least.gpus, 'GPU')}: {_describe(least)}" if least else "no number of GPUs is enough"
        yield label + found


def _describe(plan: Plan) -> str:
    rest = "" if plan.config.rollout.colocated else f" on the other {plan.gpus - plan.processes}"
    return (
        f"step {duration(plan.times.step)}: {describe_trainer(plan)} on {counted(plan.processes, 'GPU')} "
        f"({plan.fullest.total / GIB:.1f} GiB), {describe_engines(plan)}{rest}"
    )


def describe_trainer(plan: Plan) -> str:
    """The trainer's layout in one line: sizes above 1, data-parallel replicas, recompute, and what leaves the GPU."""
    training = plan.config.training
    parallel = training.parallel
    sizes = [
        f"{name} {getattr(parallel, name)}"
        for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")
        if getattr(parallel, name) > 1
    ]
    replicas = plan.processes // parallel.dense_ranks
    more = [f"recompute {training.recompute}", *["offload"] * training.offload]
    more += ["optimizer on the host"] * training.optimizer.offload
    return ", ".join([*sizes, f"data {replicas}", *more])


def describe_engines(plan: Plan) -> str:
    """Number and size of the engines."""
    return f"engines {plan.config.rollout.replicas} x {plan.config.rollout.tensor_parallel}"


def _gib(label: str, nbytes: float, note: str) -> str:
    return f"  {label:12} {nbytes / GIB:8.2f} GiB   {note}"


def _trainer_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    master = " with float32 weights" if plan.config.model.dtype == "bfloat16" else ""
    yield _gib("parameters", memory.parameters, "counted on a rank of the real model")
    yield _gib("gradients", memory.gradients, "counted; float32")
    yield _gib("optimizer", memory.optimizer, f"counted; AdamW{master}")
    yield _gib("activations", memory.activations, "formula for the plain-torch layers; balanced routing")
    yield _gib("layer", memory.layer, "formula: gradients of one layer, and its activations computed again")
    yield _gib("head", memory.head, "formula: the vocabulary head; only the larger of layer and head counts")
    yield _gib("step", memory.step, "torch's AdamW; counts only if it is more than the three above together")
    note = "weights on their way to the engines; only in a push, and more where there is room"
    yield _gib("buffers", memory.buffers, note)
    yield _gib("gather", memory.gather, "optimizer state on its way to a checkpoint; only while it is saved")
    yield _gib("reserve", memory.reserve, "assumed: CUDA context, NCCL, workspaces")


def _engine_lines(plan: Plan) -> Iterator[str]:
    engine, rollout = plan.engine, plan.config.rollout
    why = "set" if rollout.gpu_memory_utilization is not None else "what the trainer leaves, at most 0.92"
    if rollout.gpu_memory_utilization is None and not rollout.colocated:
        why = "the default"
    yield f"  gpu_memory_utilization {engine.share:.2f} ({why})"
    yield _gib("weights", engine.weights, "per GPU")
    verdict = "" if engine.sequences >= 1 else ": TOO SMALL"
    besides = f", {engine.kv_per_sequence / 2**20:.1f} MiB per sequence" if engine.kv_per_sequence else ""
    yield _gib(
        "KV cache",
        engine.kv_cache,
        f"{engine.kv_per_token / 1024:.1f} KiB per token{besides} and GPU: {engine.sequences:.1f} sequences of the "
        f"longest length, more where prompts are shared{verdict}",
    )


def _phase_lines(plan: Plan) -> Iterator[str]:
    for phase in plan.phases:
        both = f", trainer {phase.trainer / GIB:.2f} and engine {phase.engine / GIB:.2f}" if phase.engine else ""
        verdict = "fits" if phase.total <= plan.gpu.memory else "DOES NOT FIT"
        yield _gib(phase.name, phase.total, f"of {plan.gpu.memory / GIB:.2f}{both}: {verdict}")


def _host_lines(plan: Plan) -> Iterator[str]:
    host, node = plan.host, min(plan.assume.gpus_per_node, plan.processes)
    parts = {
        "pinned while engines generate": host.swapped,
        "optimizer": host.optimizer,
        "offloaded activations": host.offloaded,
        "a checkpoint being saved": host.saved,
        "processes": host.processes,
    }
    listed = ", ".join(f"{name} {nbytes / GIB:,.0f}" for name, nbytes in parts.items() if nbytes)
    verdict = "fits" if host.total <= plan.host_memory else "DOES NOT FIT"
    limit = plan.host_memory / GIB
    yield _gib("host", host.total, f"of {limit:,.0f} on a node of {node} trainer ranks ({listed}): {verdict}")


def _step_line(times: StepTimes, staleness: int) -> str:
    swap = f", weights and optimizer to the host and back {duration(times.swap)}" if times.swap else ""
    hidden = ""
    if staleness and times.hidden:
        hidden = (
            f"; {duration(times.hidden)} of the update run during the next rollout, one after the other a step takes "
            f"{duration(times.waiting)} (training.staleness: 0, training.overlap: off)"
        )
    elif times.hidden:
        hidden = (
            f"; up to {duration(times.hidden)} of the update run during the rollout, without it a step takes "
            f"{duration(times.waiting)} (training.overlap: off), and on batches that are one update old "
            f"{duration(times.one_off)} (training.staleness: 1)"
        )
    return (
        f"step      about {duration(times.step)}: rollout {duration(times.rollout)} "
        f"(prefill {duration(times.prefill)}, decoding {duration(times.decode)}), update {duration(times.update)} "
        f"(computing {duration(times.compute)}, communication {duration(times.communication)}, pipeline bubbles "
        f"{duration(times.bubble)}), weights to the engines {duration(times.push)}{swap}{hidden}"
    )


def _assumptions_line(plan: Plan) -> str:
    assume, gpu = plan.assume, plan.gpu
    lengths = assumed_lengths(plan.config, assume)
    to_host = plan.config.training.offload or plan.times.swap
    host = f", {assume.host / 1e9:.0f} GB/s to the host" if to_host else ""
    overlap = "the update overlaps the rollout, nothing else overlaps" if plan.times.hidden else "nothing overlaps"
    return (
        f"assumed   prompts of {lengths.prompt:,.0f} tokens, {lengths.asked:,.0f} of the questioner, responses of "
        f"{lengths.response:,.0f}, judgments of "
        f"{lengths.verdict:,.0f}; {assume.mixed:.0%} of the questions mixed; "
        f"{assume.matrix_efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s, {assume.memory_efficiency:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s in decoding, {assume.link_efficiency:.0%} of {gpu.link / 1e9:.0f} GB/s in "
        f"nodes of {assume.gpus_per_node} and {assume.network / 1e9:.0f} GB/s between them{host}; "
        f"{1e3 * assume.push_tensor:g} ms per tensor of a push; {overlap}"
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if not math.isfinite(seconds):
        return "for ever"
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"
