"""The fastest layouts of trainer and engines that fit, and the fewest GPUs on which there is one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from spell_megatron.config.schema import Config, ParallelConfig, TrainingConfig
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import Plan, make_plan
from spell_megatron.training.layout import layout_faults
from spell_megatron.training.policy import Architecture

TRAINERS = 12
"""Number of layouts of the trainer that are combined with all layouts of the engines: the fastest that fit."""
MOST_GPUS = 512
"""Where the search for the fewest GPUs ends."""


def fastest(model: ModelSize, config: Config, gpus: int, colocated: bool, gpu: Gpu, assume: Assumptions) -> Plan | None:
    """The plan with the shortest step that fits `gpus` GPUs, which trainer and engines share, or divide among them.

    The search covers all layouts of powers of two (tensor parallelism within a node), kinds of recompute, and what
    leaves the GPUs. Settings of the engines' memory are left to the plan. The trainer's state is found by the formula.
    """
    plans = _fitting(model, config, gpus, colocated, gpu, assume)
    return min(plans, key=lambda plan: plan.times.step, default=None)


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
    """Plans that fit."""
    for processes in [gpus] if colocated else _splits(gpus, assume.gpus_per_node):
        engines = gpus if colocated else gpus - processes
        sizes = _engine_sizes(model.arch, engines, assume)

        def plan(training: TrainingConfig, size: int, engines: int = engines) -> Plan:
            rollout = {"replicas": engines // size, "tensor_parallel": size, "colocated": colocated}
            parts = {
                "training": training,
                "rollout": config.rollout.model_copy(update=rollout | {"gpu_memory_utilization": None}),
            }
            processes = training.parallel.processes
            return make_plan(model, config.model_copy(update=parts), processes, gpu, assume, estimate)

        # The largest engines leave the most room for the rest.
        plans = (plan(training, sizes[-1]) for training in _trainings(model.arch, config.training, processes, assume))
        fitting = [plan for plan in plans if plan.trainer_fits]
        for found in sorted(fitting, key=lambda plan: plan.times.update + plan.times.swap)[:TRAINERS]:
            yield from (other for size in sizes if (other := plan(found.config.training, size)).fits)


def _splits(gpus: int, per_node: int) -> list[int]:
    """Numbers of GPUs for the trainer, of which the engines get the rest: powers of two, and eighths of all.

    On several nodes these are numbers of nodes: a job divides its nodes between trainer and engines.
    """
    unit = per_node if gpus > per_node else 1
    whole = -(-gpus // unit)
    powers = [2**i for i in range(whole.bit_length())]
    counts = {count for count in (*powers, *(whole * i // 8 for i in range(1, 8))) if 0 < count < whole}
    return [unit * count for count in sorted(counts)]


def _trainings(
    arch: Architecture, training: TrainingConfig, processes: int, assume: Assumptions
) -> Iterator[TrainingConfig]:
    """The section `training` with other layouts, and other ways to spare the GPUs' memory."""
    ways = (("none", False), ("selective", False), ("full", False), ("full", True))
    # One process shares its optimizer with nobody; a checkpoint then takes less of the host's memory.
    shared = training.optimizer.distributed and processes > 1
    optimizers = [
        training.optimizer.model_copy(update={"offload": offload, "distributed": shared}) for offload in (False, True)
    ]
    for parallel, (recompute, offload), optimizer in product(_layouts(arch, processes, assume), ways, optimizers):
        update = {"parallel": parallel, "recompute": recompute, "offload": offload, "optimizer": optimizer}
        yield training.model_copy(update=update | {"swap": "auto"})


def _engine_sizes(arch: Architecture, gpus: int, assume: Assumptions) -> list[int]:
    """Powers of two into which engines can divide the model and the GPUs; an engine does not span nodes."""
    powers = [2**i for i in range(assume.gpus_per_node.bit_length())]
    node = math.gcd(gpus, assume.gpus_per_node) if gpus > assume.gpus_per_node else gpus
    return [size for size in powers if node % size == 0 and arch.heads % size == 0]


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
