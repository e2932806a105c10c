"""The loss. This file needs torch."""

from __future__ import annotations

from typing import Any

from vectors.functions import function


@function("policy_loss")
def _(input: dict) -> Any:
    import torch

    from spell_megatron.training.objective import policy_loss

    mask = torch.tensor(input["mask"], dtype=torch.bool)
    names = ("logprob", "old_logprob", "advantage")
    tensors = [torch.tensor(input[name], dtype=torch.float64)[mask] for name in names]
    result = policy_loss(*tensors, *input["clip"], input.get("dual_clip", 3.0))
    return [
        value.double().mean().item() for value in (result.loss, result.clipped, result.approx_kl, result.clipped_lower)
    ]
