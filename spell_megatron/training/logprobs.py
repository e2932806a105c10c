"""Hidden states to log-probabilities of response tokens, without ever holding all logits.

Only positions that predict a response token are projected to the vocabulary, a chunk at a time. The
backward pass begins with the last chunk, whose softmax is kept, and projects the others again into the
same memory, so that one chunk of float32 logits is all there ever is; the gradient is the closed form
d logp_j / d logit_i = [i = j] - softmax_i. What else takes memory is cut along the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

VOCABULARY_BLOCK = 8192
"""Rows of the vocabulary head that one product works on, beside the chunk of logits."""


class TokenLogprobs(NamedTuple):
    """Of each edge, float32 [e]; only `logprob` has a gradient."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    """Of the distribution that the target was drawn from, in nats."""
    top_probability: torch.Tensor
    """Probability of that distribution's most likely token."""
    is_top: torch.Tensor
    """1 where no token is more likely than the target, else 0 (tokens of equal logits share the first place)."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    chunk: int,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> TokenLogprobs:
    """Log-probabilities of the target tokens, and what their distributions look like.

    hidden: [t, 1, hidden] after the final norm; weight: this rank's rows of the vocabulary head
    [vocab / tp, hidden], rank 0 of `group` holding the first rows; source, target: int64 [e]. Logits are
    divided by `temperature`. `vocab_size`: tokens that exist; rows of the head beyond it are padding and
    take no part. `group`: the tensor-parallel group, None for one rank.

    A position that predicts several targets (a branching point) is projected once. If `weight.main_grad`
    exists (Megatron's gradient buffer), the head's gradient is added to it in place instead of being
    returned to autograd, which spares a copy of the head. `planner.activations.head_bytes` says what memory it takes.
    """
    positions, which = torch.unique(source, return_inverse=True)
    # Edges in the order of their positions, so that each chunk of positions owns a slice of them.
    order = torch.argsort(which, stable=True)
    logprob, entropy, top_probability, is_top = _TokenLogprobs.apply(
        hidden.squeeze(1), weight, positions, which[order], target[order], 1.0 / temperature, chunk, vocab_size, group
    )
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return TokenLogprobs(logprob[back], entropy[which], top_probability[which], is_top[back])


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)


class _TokenLogprobs(torch.autograd.Function):
    """hidden [t, hidden], positions [s] of it, edges in the order of the positions that `which` counts
    -> logprob [e], entropy [s], top_probability [s], is_top [e]."""

    @staticmethod
    def forward(ctx, hidden, weight, positions, which, target, scale, chunk, vocab_size, group):
        first_id = weight.size(0) * (group.rank() if group is not None else 0)
        rows = weight.size(0) if vocab_size is None else max(0, min(weight.size(0), vocab_size - first_id))
        count = len(positions)
        logprob, is_top = (hidden.new_empty(len(which), dtype=torch.float32) for _ in range(2))
        entropy, top_probability, log_sum = (hidden.new_empty(count, dtype=torch.float32) for _ in range(3))
        # Edges of chunk c are bounds[c] .. bounds[c + 1].
        starts = torch.arange(0, count + chunk, chunk, device=which.device)
        bounds = torch.searchsorted(which, starts).tolist()
        memory = hidden.new_empty(min(chunk, count), rows, dtype=torch.float32)
        for c, begin in enumerate(range(0, count, chunk)):
            end = min(begin + chunk, count)
            logits = _logits(memory[: end - begin], hidden[positions[begin:end]], weight, scale)
            top = logits.amax(-1) if rows else logits.new_full((end - begin,), -torch.inf)
            _all_reduce(top, group, dist.ReduceOp.MAX)
            e = slice(bounds[c], bounds[c + 1])
            row, column = which[e] - begin, target[e] - first_id
            here = ((column >= 0) & (column < rows)).nonzero()[:, 0]  # edges whose target this rank holds
            chosen = torch.zeros(len(row), dtype=torch.float32, device=hidden.device)
            chosen[here] = logits[row[here], column[here]]
            # [2, s]: partition sum and sum of exp * logit of each position; one reduction for both.
            sums = torch.zeros(2, end - begin, dtype=torch.float32, device=hidden.device)
            for block in _blocks(rows):
                part = logits[:, block]
                weights = part.sub(top[:, None]).exp_()
                sums[0] += weights.sum(-1)
                sums[1] += part.mul_(weights).sum(-1)
                if end == count:
                    part.copy_(weights)
                del weights
            _all_reduce(sums, group)
            _all_reduce(chosen, group)
            log_sum[begin:end] = top + sums[0].log()
            entropy[begin:end] = log_sum[begin:end] - sums[1] / sums[0]
            top_probability[begin:end] = 1 / sums[0]  # exp(top - log_sum)
            logprob[e] = chosen - log_sum[begin:end][row]
            is_top[e] = (chosen >= top[row]).float()
            if end == count:
                logits.div_(sums[0][:, None])  # softmax of the last chunk
        ctx.memory = memory
        ctx.save_for_backward(hidden, weight, positions, which, target, log_sum)
        ctx.rest = scale, chunk, rows, first_id, bounds, group
        ctx.mark_non_differentiable(entropy, top_probability, is_top)
        return logprob, entropy, top_probability, is_top

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, positions, which, target, log_sum = ctx.saved_tensors
        scale, chunk, rows, first_id, bounds, group = ctx.rest
        memory, ctx.memory = ctx.memory, None
        grad = grad.float()
        grad_hidden = torch.zeros_like(hidden)
        in_place = getattr(weight, "main_grad", None) is not None
        grad_weight = weight.main_grad if in_place else torch.zeros_like(weight, dtype=torch.float32)
        count = len(positions)
        for c, begin in reversed(list(enumerate(range(0, count, chunk)))):
            end = min(begin + chunk, count)
            e = slice(bounds[c], bounds[c + 1])
            row, column = which[e] - begin, target[e] - first_id
            here = ((column >= 0) & (column < rows)).nonzero()[:, 0]  # edges whose target this rank holds
            h = hidden[positions[begin:end]]
            d = memory[: end - begin]
            if end < count:
                _logits(d, h, weight, scale).sub_(log_sum[begin:end, None]).exp_()
            g = grad[e] * scale
            total = torch.zeros(end - begin, dtype=torch.float32, device=h.device).index_add_(0, row, g)
            d.mul_(-total[:, None])
            d.index_put_((row[here], column[here]), g[here], accumulate=True)
            grad_h = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
            for block in _blocks(rows):
                part = d[:, block].to(weight.dtype)
                _add_product(grad_h, part, weight[block])
                _add_product(grad_weight[block], part.T, h)
            _all_reduce(grad_h, group)
            grad_hidden[positions[begin:end]] = grad_h.to(hidden.dtype)
        return grad_hidden, None if in_place else grad_weight.to(weight.dtype), *(None,) * 7


def _blocks(rows: int) -> list[slice]:
    return [slice(v, min(v + VOCABULARY_BLOCK, rows)) for v in range(0, rows, VOCABULARY_BLOCK)]


def _logits(out: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """Float32 logits divided by the temperature into `out` [positions, rows], of the weight's first rows."""
    for block in _blocks(out.size(1)):
        out[:, block] = F.linear(h, weight[block])
    return out.mul_(scale)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; a total of another type gets the product rounded to theirs."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
