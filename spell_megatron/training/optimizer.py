"""The optimizer of the policy, and the schedule of its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from spell_megatron.config.schema import OptimizerConfig
from spell_megatron.training.model import TreeGPTModel


def build_optimizer(
    model: TreeGPTModel, options: OptimizerConfig, gloo: bool = True
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """The model with its gradient buffers, and Megatron's optimizer of them.

    gloo: False on a process group that is not there (`backend.pretend`), which has no gloo groups beside it.
    """
    # Gradients are reduced after the last microbatch, not during the backward pass: the vocabulary
    # head adds to its gradient buffer itself, unseen by the hooks that an overlap relies on.
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=options.distributed),
        model,
    )
    dtype = model.policy.dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.betas[0],
            adam_beta2=options.betas[1],
            adam_eps=options.eps,
            clip_grad=options.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=options.distributed,
        ),
        [ddp],
        use_gloo_process_groups=gloo,
    )
    return ddp, optimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that a Megatron optimizer is made of: one, or with expert parallelism two."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def build_schedule(optimizer: MegatronOptimizer, options: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Megatron's schedule of the learning rate, whose decay ends at update `steps`."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=min(options.min_lr, options.lr),
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=max(steps, options.warmup_steps + 1),
        lr_decay_style=options.decay,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
