"""A plan: what a configuration needs on a kind of GPU, whether it fits, and how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config.schema import Config
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import Count, TrainerMemory, trainer_memory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.phases import (
    EngineMemory,
    HostMemory,
    Phase,
    engine_memory,
    engine_share,
    host_memory,
    leaving,
    trainer_phases,
)
from spell_megatron.planner.times import StepTimes, step_times


@dataclass(frozen=True)
class Plan:
    """A configuration with its memory and times on a kind of GPU."""

    config: Config
    processes: int
    gpu: Gpu
    memory: TrainerMemory
    engine: EngineMemory
    phases: tuple[Phase, ...]
    """Of the trainer's GPUs; of the engines' too, if they are the same."""
    host: HostMemory
    """Of a node of the trainer."""
    times: StepTimes
    assume: Assumptions

    @property
    def gpus(self) -> int:
        """Number of GPUs of trainer and engines."""
        rollout = self.config.rollout
        return self.processes + (0 if rollout.colocated else rollout.replicas * rollout.tensor_parallel)

    @property
    def fullest(self) -> Phase:
        """The phase that needs the most GPU memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def host_memory(self) -> float:
        """Bytes that a node has."""
        return self.assume.host_memory or self.gpu.host_memory * self.assume.gpus_per_node

    @property
    def trainer_fits(self) -> bool:
        """Whether the trainer's GPUs and the host have enough memory."""
        return self.fullest.total <= self.gpu.memory and self.host.total <= self.host_memory

    @property
    def fits(self) -> bool:
        """Whether GPUs and host have enough memory, and engines room for one sequence of the longest length."""
        return self.trainer_fits and self.engine.sequences >= 1


def make_plan(
    model: ModelSize, config: Config, processes: int, gpu: Gpu, assume: Assumptions, counting: Count | None = None
) -> Plan:
    """The plan of a configuration with so many trainer processes.

    counting: how the trainer's state is found (see `trainer_memory`).
    """
    memory = trainer_memory(model, config, processes, assume, counting)
    engine = engine_memory(model, config, engine_share(config, memory, gpu.memory), gpu.memory, assume)
    host = host_memory(config, memory, processes, assume)
    to_host = leaving(config, memory).host + memory.kept
    return Plan(
        config=config,
        processes=processes,
        gpu=gpu,
        memory=memory,
        engine=engine,
        phases=tuple(trainer_phases(config, memory, engine, gpu.memory, assume)),
        host=host,
        times=step_times(model, config, processes, gpu, assume, engine, to_host),
        assume=assume,
    )
