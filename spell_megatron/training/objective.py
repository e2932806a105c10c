"""The GRPO objective on flat tensors of response tokens (clipped surrogate of PPO with dual clip).

SPELL, Eq. 12 (arXiv 2509.23863): J = sum_i A_i sum_t rho_it / number of response tokens. With one
gradient step per batch the ratio rho is 1 where it is differentiated and no clip is active; the clipped
form and its rates are kept for batches that are not on-policy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20, so that an absurd pair of log-probabilities cannot overflow."""


class PolicyLoss(NamedTuple):
    """All tensors [tokens]; the last three carry no gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor
    approx_kl: torch.Tensor
    clipped_lower: torch.Tensor


def policy_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> PolicyLoss:
    """Loss of each response token.

    With rho = exp(logprob - old_logprob): max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) (PPO,
    arXiv 1707.06347 Eq. 7), and for A < 0 at most -A clip_dual (dual clip, arXiv 1912.09729 Eq. 5).
    All inputs [tokens]. `clipped` is 1 where the PPO clip is active, `clipped_lower` where the dual clip
    is, `approx_kl` is -log rho, whose mean estimates KL(old || new).

    A role's weight multiplies the advantage, so it enters the numerator of the mean and not its
    denominator, which is the plain number of response tokens.
    """
    log_ratio = (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = torch.maximum(plain, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    dual = -advantage * clip_dual
    negative = advantage < 0
    loss = torch.where(negative, torch.minimum(clipped, dual), clipped)
    with torch.no_grad():
        return PolicyLoss(loss, (clipped > plain).float(), -log_ratio.detach(), ((clipped > dual) & negative).float())


def importance_weight(log_ratio: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated importance weights min(exp(log_ratio), cap), and 1 where the cap is reached; both without gradient.

    log_ratio [tokens]: log-probability by the trainer minus that by the engine, of each token (Yao et al.,
    https://fengyao.notion.site/off-policy-rl) or of the token's whole response (Liu, Li et al.,
    https://richardli.xyz/rl-collapse). It is clamped like the others.
    """
    ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return ratio.clamp(max=cap), (ratio >= cap).float()


def agg_loss(
    loss: torch.Tensor,
    mask: torch.Tensor,
    mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"],
) -> torch.Tensor:
    """Reduce padded per-token losses [rows, tokens] to a scalar; the trainer's own reduction is token-mean.

    token-mean: mean over all tokens of the mask; seq-mean-token-sum: mean over rows of the rows' sums;
    seq-mean-token-mean: mean over rows of the rows' means. ValueError for another mode.
    """
    sums, counts = (loss * mask).sum(-1), mask.sum(-1)
    if mode == "token-mean":
        return sums.sum() / counts.sum()
    if mode == "seq-mean-token-sum":
        return sums.mean()
    if mode == "seq-mean-token-mean":
        return (sums / counts).mean()
    raise ValueError(f"mode {mode!r} is not token-mean, seq-mean-token-sum or seq-mean-token-mean")
