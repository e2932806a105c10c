"""The fastest layouts of trainer and engines that fit, and the fewest GPUs on which there is one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from spell_megatron.config.schema import Config, ParallelConfig
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import Plan, make_plan
from spell_megatron.training.layout import layout_faults
from spell_megatron.training.policy import Architecture

TRAINERS = 12
"""Number of layouts of the trainer that are combined with all layouts of the engines: the fastest that fit."""
TRIES = 4
"""Largest number of plans that are counted on a real rank."""
MOST_GPUS = 512
"""Where the search for the fewest GPUs ends."""


def fastest(model: ModelSize, config: Config, gpus: int, colocated: bool, gpu: Gpu, assume: Assumptions) -> Plan | None:
    """The plan with the shortest step that fits `gpus` GPUs, which trainer and engines share, or divide among them.

    The search covers all layouts of powers of two (tensor parallelism within a node), kinds of recompute, and what
    leaves shared GPUs. Settings of the engines' memory are left to the plan.
    """
    found = sorted(_fitting(model, config, gpus, colocated, gpu, assume), key=lambda plan: plan.times.step)
    for plan in found[:TRIES]:
        counted = make_plan(model, plan.config, plan.processes, gpu, assume)
        if counted.fits:
            return counted
    return None


def fewest(model: ModelSize, config: Config, colocated: bool, gpu: Gpu, assume: Assumptions) -> Plan | None:
    """The fastest plan on the fewest GPUs, a power of two, on which there is one that fits."""
    gpus = 1 if colocated else 2
    while gpus <= MOST_GPUS:
        if plan := fastest(model, config, gpus, colocated, gpu, assume):
            return plan
        gpus *= 2
    return None


def _fitting(
    model: ModelSize, config: Config, gpus: int, colocated: bool, gpu: Gpu, assume: Assumptions
) -> Iterator[Plan]:
    """Plans that fit by the formula, without counting."""
    trainers = [gpus] if colocated else [2**i for i in range(gpus.bit_length()) if 2**i < gpus]
    for processes in trainers:
        engines = gpus if colocated else gpus - processes
        sizes = _engine_sizes(model.arch, engines, assume)
        plans = []
        for training in _trainings(model.arch, processes, colocated, assume):
            # The largest engines leave the most room for the rest.
            plan = _variant(model, config, training, engines, sizes[-1], colocated, gpu, assume)
            if plan.trainer_fits:
                plans.append(plan)
        for plan in sorted(plans, key=lambda plan: plan.times.update + plan.times.swap)[:TRAINERS]:
            again = {name: getattr(plan.config.training, name) for name in ("parallel", "recompute", "offload")}
            for size in sizes:
                other = _variant(model, config, again, engines, size, colocated, gpu, assume)
                if other.fits:
                    yield other


def _variant(
    model: ModelSize,
    config: Config,
    training: dict[str, Any],
    engines: int,
    size: int,
    colocated: bool,
    gpu: Gpu,
    assume: Assumptions,
) -> Plan:
    """The plan of a configuration with these settings of the trainer, and engines of `size` GPUs on `engines` GPUs."""
    rollout = {
        "replicas": engines // size,
        "tensor_parallel": size,
        "colocated": colocated,
        "gpu_memory_utilization": None,
    }
    parts = {
        "training": config.training.model_copy(update=training),
        "rollout": config.rollout.model_copy(update=rollout),
    }
    return make_plan(model, config.model_copy(update=parts), training["parallel"].processes, gpu, assume, estimate)


def _trainings(arch: Architecture, processes: int, colocated: bool, assume: Assumptions) -> Iterator[dict[str, Any]]:
    """Settings of the section `training` to be tried."""
    for parallel in _layouts(arch, processes, assume):
        for recompute, offload in (("none", False), ("selective", False), ("full", False), ("full", True)):
            yield {"parallel": parallel, "recompute": recompute, "offload": offload}


def _engine_sizes(arch: Architecture, gpus: int, assume: Assumptions) -> list[int]:
    """Powers of two into which engines can divide the model and the GPUs; an engine does not span nodes."""
    powers = [2**i for i in range(assume.gpus_per_node.bit_length())]
    return [size for size in powers if size <= gpus and gpus % size == 0 and arch.heads % size == 0]


def _layouts(arch: Architecture, processes: int, assume: Assumptions) -> Iterator[ParallelConfig]:
    """All layouts of powers of two in which the model can be trained."""
    powers = [2**i for i in range(processes.bit_length())]
    for tensor, pipeline, context, expert in product(powers, powers, powers, powers if arch.experts else [1]):
        for expert_tensor in {1, tensor} if arch.experts else {1}:
            layout = ParallelConfig(
                processes=processes,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                expert=expert,
                expert_tensor=expert_tensor,
            )
            within_node = tensor <= assume.gpus_per_node
            if within_node and layout.divides(processes) and not any(layout_faults(arch, layout)):
                yield layout
