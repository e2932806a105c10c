"""Faults of Megatron-Core where neither transformer-engine nor apex is installed, corrected on CPUs and GPUs alike."""

from __future__ import annotations

import functools

import torch
from torch.optim import Optimizer


@functools.cache
def correct_megatron() -> None:
    """Correct Megatron-Core, once per process.

    * 0.16 leaves the name `moe_utils.te_general_gemm` undefined.
    * The distributed optimizer cannot load the state of torch's AdamW, which takes the place of theirs: see
      `_load_steps`.

    Nothing changes where they are installed: their optimizers keep no `step` per parameter.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    _load_steps()


def _load_steps() -> None:
    """Let Megatron's distributed optimizer load the `step` of torch's AdamW.

    Its fully reshardable format holds no `step` per parameter although loading asks for one. After loading, all
    parameters share one `step` tensor, which AdamW then advances once per parameter.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_state = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    def set_state_with_step(self, model_param, tensors):
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state.get(self.optimizer.param_groups[group]["params"][order], {})
            if "step" in state:
                tensors = {**tensors, "step": state["step"].clone()}
        return set_state(self, model_param, tensors)

    def load_with_own_steps(self, state_dict):
        result = load(self, state_dict)
        optimizer: Optimizer = self.optimizer
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    DistributedOptimizer._set_main_param_and_optimizer_states = set_state_with_step
    DistributedOptimizer.load_state_dict = load_with_own_steps
