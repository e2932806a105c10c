"""Hidden states to log-probabilities of response tokens, without ever holding all logits.

Only positions that predict a response token are projected to the vocabulary, a chunk at a time. The
backward pass begins with the last chunk, which is kept, and projects the others again, so that at most
one chunk of logits exists; the gradient is the closed form d logp_j / d logit_i = [i = j] - softmax_i.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

WEIGHT_BLOCK = 16384
"""Vocabulary rows whose weight gradient is computed at a time when it cannot be added in place."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    chunk: int,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the target tokens, and the entropies of their distributions.

    hidden: [t, 1, hidden] after the final norm; weight: this rank's rows of the vocabulary head
    [vocab / tp, hidden], rank 0 of `group` holding the first rows; source, target: int64 [e]. Logits are
    divided by `temperature`. `vocab_size`: tokens that exist; rows of the head beyond it are padding and
    take no part. `group`: the tensor-parallel group, None for one rank.

    Returns float32 [e] log-probabilities, and float32 [e] entropies in nats without gradient. A position
    that predicts several targets (a branching point) is projected once. If `weight.main_grad` exists
    (Megatron's gradient buffer), the head's gradient is added to it in place instead of being returned
    to autograd, which spares a copy of the head.
    """
    positions, which = torch.unique(source, return_inverse=True)
    h = hidden[:, 0].index_select(0, positions)
    # Edges in the order of their positions, so that each chunk of positions owns a slice of them.
    order = torch.argsort(which, stable=True)
    logprob, entropy = _TokenLogprobs.apply(
        h, weight, which[order], target[order], 1.0 / temperature, chunk, vocab_size, group
    )
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return logprob[back], entropy[which]


def _all_reduce(
    x: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp = dist.ReduceOp.SUM
) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)


class _TokenLogprobs(torch.autograd.Function):
    """h [s, hidden], edges sorted by position -> logprob [e], entropy [s]."""

    @staticmethod
    def forward(ctx, h, weight, which, target, scale, chunk, vocab_size, group):
        first_id = weight.size(0) * (group.rank() if group is not None else 0)
        rows = weight.size(0) if vocab_size is None else max(0, min(weight.size(0), vocab_size - first_id))
        logprob = h.new_empty(len(which), dtype=torch.float32)
        entropy = h.new_empty(len(h), dtype=torch.float32)
        log_sum = h.new_empty(len(h), dtype=torch.float32)
        # Edges of chunk c are bounds[c] .. bounds[c + 1].
        starts = torch.arange(0, len(h) + chunk, chunk, device=which.device)
        bounds = torch.searchsorted(which, starts).tolist()
        weights = None
        for c, begin in enumerate(range(0, len(h), chunk)):
            end = min(begin + chunk, len(h))
            weights = None  # free the chunk before
            logits = _logits(h[begin:end], weight[:rows], scale)
            top = logits.amax(-1) if rows else logits.new_full((end - begin,), -torch.inf)
            _all_reduce(top, group, dist.ReduceOp.MAX)
            e = slice(bounds[c], bounds[c + 1])
            row, column = which[e] - begin, target[e] - first_id
            here = ((column >= 0) & (column < rows)).nonzero()[:, 0]  # edges whose target this rank holds
            chosen = torch.zeros(len(row), dtype=torch.float32, device=h.device)
            chosen[here] = logits[row[here], column[here]]
            weights = logits.sub(top[:, None]).exp_()
            # [2, s]: partition sum and sum of exp * logit of each position; one reduction for both.
            sums = torch.stack([weights.sum(-1), torch.linalg.vecdot(weights, logits)])
            _all_reduce(sums, group)
            _all_reduce(chosen, group)
            log_sum[begin:end] = top + sums[0].log()
            entropy[begin:end] = log_sum[begin:end] - sums[1] / sums[0]
            logprob[e] = chosen - log_sum[begin:end][row]
            del logits
        if weights is not None:
            weights.div_(sums[0][:, None])  # softmax of the last chunk
        ctx.last_softmax = weights
        ctx.save_for_backward(h, weight, which, target, log_sum)
        ctx.rest = scale, chunk, rows, first_id, bounds, group
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad, _):
        h, weight, which, target, log_sum = ctx.saved_tensors
        scale, chunk, rows, first_id, bounds, group = ctx.rest
        grad = grad.float()
        grad_h = torch.empty(h.shape, dtype=torch.float32, device=h.device)
        in_place = getattr(weight, "main_grad", None) is not None
        grad_weight = weight.main_grad if in_place else torch.zeros_like(weight, dtype=torch.float32)
        softmax, ctx.last_softmax = ctx.last_softmax, None
        for c, begin in reversed(list(enumerate(range(0, len(h), chunk)))):
            end = min(begin + chunk, len(h))
            e = slice(bounds[c], bounds[c + 1])
            row, column = which[e] - begin, target[e] - first_id
            here = ((column >= 0) & (column < rows)).nonzero()[:, 0]  # edges whose target this rank holds
            if softmax is None:
                softmax = _logits(h[begin:end], weight[:rows], scale).sub_(log_sum[begin:end, None]).exp_()
            g = grad[e] * scale
            total = torch.zeros(end - begin, dtype=torch.float32, device=h.device).index_add_(0, row, g)
            d, softmax = softmax.mul_(-total[:, None]), None
            d.index_put_((row[here], column[here]), g[here], accumulate=True)
            d = d.to(weight.dtype)
            grad_h[begin:end] = d @ weight[:rows]
            if grad_weight.dtype == d.dtype:
                grad_weight[:rows].addmm_(d.T, h[begin:end])
            else:
                for v in range(0, rows, WEIGHT_BLOCK):
                    block = slice(v, min(v + WEIGHT_BLOCK, rows))
                    grad_weight[block].add_(d[:, block].T @ h[begin:end])
        _all_reduce(grad_h, group)
        return (grad_h.to(h.dtype), None if in_place else grad_weight.to(weight.dtype), *(None,) * 6)


def _logits(h: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """Float32 logits [positions, vocab] divided by the temperature."""
    return F.linear(h, weight).float().mul_(scale)
