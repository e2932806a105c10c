"""The plan of a layout, and the fastest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from spell_megatron.config.schema import Config, ParallelConfig
from spell_megatron.planner.activations import element_bytes, row_tokens, stage_activations
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import TrainerMemory, trainer_memory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.times import StepTimes, step_times
from spell_megatron.training.layout import layout_faults
from spell_megatron.training.policy import Architecture

TRIES = 12
"""Largest number of layouts that `fastest` builds."""


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and times on a kind of GPU."""

    processes: int
    parallel: ParallelConfig
    recompute: str
    offload: bool
    memory: TrainerMemory
    times: StepTimes
    gpu: Gpu

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has enough GPU memory."""
        return self.memory.total <= self.gpu.memory


def plan_layout(model: ModelSize, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Plan:
    """Memory and times of the layout of `config` on `processes` GPUs."""
    return Plan(
        processes,
        config.training.parallel,
        config.training.recompute,
        config.training.offload,
        trainer_memory(model, config, processes, assume),
        step_times(model, config, processes, gpu, assume),
        gpu,
    )


def fastest(model: ModelSize, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Iterator[Plan]:
    """Plans of other layouts on the same GPUs, in the order of their update times; the last one is the first that fits.

    The search covers all layouts of powers of two (tensor parallelism within a node) whose memory, roughly, is within
    the GPU's. At most TRIES of them are built.
    """
    candidates: list[tuple[float, Config]] = []
    for parallel in _layouts(model.arch, processes, assume):
        for recompute, offload in (("none", False), ("selective", False), ("full", False), ("full", True)):
            update = {"parallel": parallel, "recompute": recompute, "offload": offload}
            other = config.model_copy(update={"training": config.training.model_copy(update=update)})
            if _rough_bytes(model, other, processes, assume) <= gpu.memory:
                candidates.append((step_times(model, other, processes, gpu, assume).update, other))
    for _, other in sorted(candidates, key=lambda candidate: candidate[0])[:TRIES]:
        plan = plan_layout(model, other, processes, gpu, assume)
        yield plan
        if plan.fits:
            return


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


def _rough_bytes(model: ModelSize, config: Config, processes: int, assume: Assumptions) -> float:
    """About the bytes of a rank, without building it; a little less than `trainer_memory` counts."""
    arch, parallel = model.arch, config.training.parallel
    own_dense = model.dense_parameters / parallel.tensor / parallel.pipeline
    own_experts = model.parameters.experts / parallel.expert_ranks
    state = (own_dense + own_experts) * (element_bytes(config) + 4)
    shards = processes if config.training.optimizer.distributed else 1
    state += 12 * model.parameters.all / parallel.pipeline / (shards / parallel.pipeline if shards > 1 else 1)
    tokens, layers = row_tokens(config), range(arch.layers // parallel.pipeline)
    activations = stage_activations(arch, config, layers, tokens, parallel.pipeline, gpu=True)
    return state + sum(activations) + assume.reserve
