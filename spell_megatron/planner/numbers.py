"""A plan as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spell_megatron.planner.plan import Plan


def plan_numbers(plan: Plan) -> dict[str, Any]:
    """What a plan says. Memory is in bytes, times are in seconds."""
    training, rollout = plan.config.training, plan.config.rollout
    return {
        "fits": plan.fits,
        "gpus": plan.gpus,
        "gpu": {"name": plan.gpu.name, "memory": int(plan.gpu.memory)},
        "trainer": {
            **training.parallel.model_dump(),
            "processes": plan.processes,
            "recompute": training.recompute,
            "offload": training.offload,
            "optimizer_offload": training.optimizer.offload,
        },
        "engines": {
            "replicas": rollout.replicas,
            "tensor_parallel": rollout.tensor_parallel,
            "colocated": rollout.colocated,
            **asdict(plan.engine),
        },
        "phases": {phase.name: phase._asdict() | {"total": phase.total} for phase in plan.phases},
        "host": {**plan.host._asdict(), "memory": int(plan.host_memory)},
        "seconds": {
            **asdict(plan.times),
            "waiting": plan.times.waiting,
            "one_off": plan.times.one_off,
            "step": plan.times.step,
        },
    }
