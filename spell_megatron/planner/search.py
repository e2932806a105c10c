"""Plan a layout, and find the fastest one that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spell_megatron.config.schema import Config, ParallelConfig
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import Memory, Model, element_bytes, row_tokens, stage_activations, trainer_memory
from spell_megatron.planner.times import Times, step_times
from spell_megatron.training.layout import layout_faults
from spell_megatron.training.policy import Architecture

TRIES = 12
"""Layouts that `cheapest` builds."""


@dataclass(frozen=True)
class Plan:
    """A layout and what it needs."""

    processes: int
    parallel: ParallelConfig
    recompute: str
    offload: bool
    memory: Memory
    times: Times
    gpu: Gpu

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.memory

    @property
    def gpu_seconds(self) -> float:
        """GPU seconds of the trainer per update."""
        return self.processes * self.times.update


def plan_layout(model: Model, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Plan:
    """What the layout of `config` needs on `processes` GPUs."""
    return Plan(
        processes,
        config.training.parallel,
        config.training.recompute,
        config.training.offload,
        trainer_memory(model, config, processes, assume),
        step_times(model, config, processes, gpu, assume),
        gpu,
    )


def cheapest(model: Model, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Iterator[Plan]:
    """Plans of other layouts on the same GPUs, those with the fastest updates first; ends after the first that fits.

    Tried are all layouts of powers of two (tensor parallelism inside a node) whose memory, roughly, is within the
    GPU's; at most TRIES of them are built.
    """
    arch = model.arch
    found = []
    modes = (("none", False), ("selective", False), ("full", False), ("full", True))
    for parallel in _layouts(arch, processes, assume):
        for recompute, offload in modes:
            update = {"parallel": parallel, "recompute": recompute, "offload": offload}
            other = config.model_copy(update={"training": config.training.model_copy(update=update)})
            if _rough_bytes(model, other, processes, assume) <= gpu.memory:
                times = step_times(model, other, processes, gpu, assume)
                found.append((times.update, len(found), other))
    for _, _, other in sorted(found, key=lambda entry: entry[:2])[:TRIES]:
        tried = plan_layout(model, other, processes, gpu, assume)
        yield tried
        if tried.fits:
            return


def _layouts(arch: Architecture, processes: int, assume: Assumptions) -> Iterator[ParallelConfig]:
    powers = [2**i for i in range(processes.bit_length())]
    experts = powers if arch.experts else [1]
    for tensor in powers:
        for pipeline in powers:
            for context in powers:
                for expert in experts:
                    for expert_tensor in {1, tensor} if arch.experts else {1}:
                        layout = ParallelConfig(
                            processes=processes,
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            expert=expert,
                            expert_tensor=expert_tensor,
                        )
                        if (
                            tensor <= assume.gpus_per_node
                            and layout.divides(processes)
                            and not any(layout_faults(arch, layout))
                        ):
                            yield layout


def _rough_bytes(model: Model, config: Config, processes: int, assume: Assumptions) -> float:
    """Memory of a rank without building it; a little less than what `trainer_memory` counts."""
    arch, parallel = model.arch, config.training.parallel
    experts = model.expert_parameters
    dense = model.parameters - experts
    own_dense = dense / parallel.tensor / parallel.pipeline
    own_experts = experts / parallel.expert / parallel.expert_tensor / parallel.pipeline
    state = (own_dense + own_experts) * (element_bytes(config) + 4)
    shards = processes if config.training.optimizer.distributed else 1
    state += 12 * (dense + experts) / parallel.pipeline / (shards / parallel.pipeline if shards > 1 else 1)
    tokens, layers = row_tokens(config), range(arch.layers // parallel.pipeline)
    activations = stage_activations(arch, config, layers, tokens, parallel.pipeline, gpu=True)
    return state + sum(activations) + assume.reserve
