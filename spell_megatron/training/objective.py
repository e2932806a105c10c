"""The GRPO objective on flat tensors of response tokens (clipped surrogate of PPO with dual clip).

SPELL, Eq. 12 (arXiv 2509.23863): J = sum_i A_i sum_t rho_it / number of response tokens. With one
gradient step per batch the ratio rho is 1 where it is differentiated, so that no clip is ever active. The
trainer therefore logs no rates of clipping.
"""

from __future__ import annotations

import torch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20, so that an absurd pair of log-probabilities cannot overflow."""


def policy_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> torch.Tensor:
    """Loss of each response token; all tensors are [tokens].

    With rho = exp(logprob - old_logprob): max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) (PPO,
    arXiv 1707.06347 Eq. 7), and for A < 0 at most -A clip_dual (dual clip, arXiv 1912.09729 Eq. 5).

    A role's weight multiplies the advantage, so it enters the numerator of the mean and not its
    denominator, which is the plain number of response tokens.
    """
    ratio = (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    return torch.where(advantage < 0, torch.minimum(clipped, -advantage * clip_dual), clipped)


def importance_weight(log_ratio: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated importance weights min(exp(log_ratio), cap), and 1 where the cap is reached; both without gradient.

    log_ratio [tokens]: log-probability by the trainer minus that by the engine, of each token (Yao et al.,
    https://fengyao.notion.site/off-policy-rl) or of the token's whole response (Liu, Li et al.,
    https://richardli.xyz/rl-collapse). It is clamped like the others.
    """
    ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return ratio.clamp(max=cap), (ratio >= cap).float()
