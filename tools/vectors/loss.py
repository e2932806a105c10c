"""The loss. This file needs torch."""

from __future__ import annotations

from typing import Any

from vectors.functions import function


@function("policy_loss")
def _(input: dict) -> Any:
    import torch

    from spell_megatron.training.objective import policy_loss

    mask = torch.tensor(input["mask"], dtype=torch.bool)
    logprob, old, advantage = (
        torch.tensor(input[name], dtype=torch.float64)[mask] for name in ("logprob", "old_logprob", "advantage")
    )
    (low, high), dual = input["clip"], input.get("dual_clip", 3.0)
    loss = policy_loss(logprob, old, advantage, low, high, dual)
    # The reference also returns how often each clip is active, and an estimate of the KL divergence. The trainer has
    # no use for them: on-policy they are 0.
    ratio = (logprob - old).exp()
    clipped = policy_loss(logprob, old, advantage, low, high, float("inf"))
    rates = (clipped > -advantage * ratio), old - logprob, (clipped > -advantage * dual) & (advantage < 0)
    return [value.double().mean().item() for value in (loss, *rates)]
