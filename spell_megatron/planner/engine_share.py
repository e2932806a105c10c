"""The memory that the engines of a run get on its own machine."""

from __future__ import annotations

from spell_megatron.config.schema import Config, RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.ranks import launched_processes
from spell_megatron.rollout.placement import gpu_memory, shares_gpus

GIB = 2**30


def engine_settings(config: Config, trainers: int, nodes: int = 1) -> RolloutConfig:
    """The section `rollout` with the share of the GPUs' memory that engines on the trainer's GPUs get.

    Where engines have GPUs of their own, or the share is set, the section stays as it is.

    Args:
        trainers: trainer processes on each machine of engines.
        nodes: machines over which the engines are spread.

    Raises:
        UserError: the trainer leaves too little for the engines.
    """
    rollout = config.rollout
    gpus = rollout.replicas * rollout.tensor_parallel // nodes
    if rollout.gpu_memory_utilization is None and shares_gpus(gpus, config.run.device, trainers, rollout.colocated):
        rollout = rollout.model_copy(update={"gpu_memory_utilization": share_on(gpu_memory(), config)})
    return rollout


def share_on(memory: int, config: Config) -> float:
    """The share of GPUs of `memory` bytes that engines get which share them with the trainer.

    Raises:
        UserError: it is too little.
    """
    # Megatron-Core takes seconds to import.
    from spell_megatron.planner.gpus import Assumptions
    from spell_megatron.planner.memory import estimate, trainer_memory
    from spell_megatron.planner.model_size import ModelSize
    from spell_megatron.planner.phases import engine_memory, engine_share
    from spell_megatron.training.policy import PolicyModel

    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    assume, rollout = Assumptions(), config.rollout.model_copy(update={"colocated": True})
    config = config.model_copy(update={"rollout": rollout})
    processes = launched_processes() or config.training.parallel.processes
    # By the formula: Megatron's own count would make a process group that is not there, in a run that has one.
    share = engine_share(config, trainer_memory(model, config, processes, assume, estimate), memory)
    engine = engine_memory(model, config, share, memory, assume)
    if engine.sequences < 1:
        longest = engine.kv_per_token * rollout.sampling.longest_sequence + engine.kv_per_sequence
        raise UserError(
            f"On GPUs of {memory / GIB:.1f} GiB the trainer leaves {share * memory / GIB:.1f} GiB to the engines. Of "
            f"each GPU they need {engine.weights / GIB:.1f} GiB for weights, {assume.engine_workspace / GIB:.1f} GiB "
            f"for their work and {longest / GIB:.1f} GiB for one sequence of the longest length. `spell plan` proposes "
            "layouts that fit."
        )
    return share
