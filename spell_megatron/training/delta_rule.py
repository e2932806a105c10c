"""The gated delta rule and the causal convolution over prefix trees (Gated Delta Networks, arXiv:2412.06464).

Each head has a state S [key, value], which is zero before a tree. A token with key k, query q, value v, log-decay g and
rate b changes and reads it:

    S <- exp(g) S,   S <- S + b k (v - S^T k)^T,   output S^T q

The state after a branching point is computed once and handed to every child; the gradients of the children add up in
it. The rule works on chunks of tokens (matrix products), one chunk of all pieces of a level after the other
(`tree_levels`), so that its time is linear in the tokens. On CPUs it keeps the inputs and the states between pieces
and computes the rest again in the backward pass. On GPUs flash-linear-attention does the same inside its kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spell_megatron.training.tree_levels import Forest, Level

CHUNK = 64
"""Tokens of a chunk."""
PIECE = 2048
"""Most tokens of a piece on CPUs: what the backward pass computes again at once. GPUs take whole chains."""


def tree_convolution(x: Tensor, weight: Tensor, forest: Forest) -> Tensor:
    """A causal convolution of each channel along the paths of a forest, then SiLU.

    Args:
        x: [tokens, channels].
        weight: [channels, 1, width]; the last place is that of the token itself.

    Returns:
        [tokens, channels] in the order of the forest's levels.
    """
    padded = F.pad(x, (0, 0, 0, 1))  # the row of zeros before the trees
    rows = padded.index_select(0, forest.window).T[None]
    convolved = F.conv1d(rows, weight, groups=len(weight))[0].T
    return F.silu(convolved.index_select(0, forest.convolved))


def tree_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, forest: Forest) -> Tensor:
    """The gated delta rule along the paths of a forest. Tokens are in the order of its levels.

    Args:
        query, key: [tokens, key heads, key dim]; they are normalised here, queries scaled by 1 / sqrt(key dim) too.
        value: [tokens, heads, value dim]; heads is a multiple of the key heads, whose consecutive heads share one.
        decay: [tokens, heads] logarithms, at most 0, float32.
        rate: [tokens, heads], 0 to 1.

    Returns:
        [tokens, heads, value dim], type of `value`.
    """
    sizes = [level.tokens for level in forest.levels]
    parts = zip(*(x.split(sizes) for x in (query, key, value, decay, rate)))
    rule = _on_gpu if value.is_cuda else _on_cpu
    outputs, states = [], None
    for level, inputs in zip(forest.levels, parts, strict=True):
        output, states = rule(level, states, *inputs)
        outputs.append(output)
    return torch.cat(outputs)


def _on_gpu(level: Level, states: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `_LevelOnCpu`, by flash-linear-attention."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    query, key, value, decay, rate = (x[None].contiguous() for x in inputs)
    output, last = chunk_gated_delta_rule(
        q=query,
        k=key,
        v=value,
        g=decay,
        beta=rate,
        initial_state=None if states is None else states.index_select(0, level.parents),
        output_final_state=level.bearing is not None,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.tensor([0, *np.cumsum(level.lengths)], device=value.device),
    )
    return output[0], None if level.bearing is None else last.index_select(0, level.bearing)


def _on_cpu(level: Level, states: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    output, left = _LevelOnCpu.apply(level, states, *inputs)
    return output, None if level.bearing is None else left


class _LevelOnCpu(torch.autograd.Function):
    """The rule over the pieces of a level: the states that the level before has left [states, heads, key, value] and
    the level's inputs -> its output [tokens, heads, value dim] and the states that it leaves."""

    @staticmethod
    def forward(ctx: Any, level: Level, states: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.level = level
        ctx.save_for_backward(states, *inputs)
        return _level(level, states, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            results = _level(ctx.level, *saved)
        given = [x for x in saved if x is not None]
        pairs = [pair for pair in zip(results, gradients) if pair[0].requires_grad]
        found = iter(torch.autograd.grad([r for r, _ in pairs], given, [g for _, g in pairs], allow_unused=True))
        return None, *(None if x is None else next(found) for x in saved)


def _level(level: Level, states: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What `_LevelOnCpu` computes, with gradients by autograd."""
    initial = None if states is None else states.index_select(0, level.parents)
    output, last = _pieces(level.lengths, initial, *inputs)
    return output, last[:0] if level.bearing is None else last.index_select(0, level.bearing)


def _pieces(
    lengths: tuple[int, ...],
    initial: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rule over pieces of descending lengths, from their initial states.

    All chunks are prepared together. Then the states pass from chunk to chunk of all pieces at once. Chunks are in
    the order of these steps, so that a step's chunks are neighbours and begin with the longest piece.
    """
    size = min(CHUNK, 1 << (lengths[0] - 1).bit_length())
    steps, places = _chunks(lengths, size)
    exact = torch.promote_types(value.dtype, torch.float32)
    index = torch.from_numpy(places)

    def chunked(x: Tensor) -> Tensor:
        """[tokens, heads, ...] -> [chunks, heads, chunk, ...], zero behind the pieces."""
        whole = x.new_zeros(sum(steps) * size, *x.shape[1:], dtype=exact).index_copy(0, index, x.to(exact))
        return whole.unflatten(0, (-1, size)).transpose(1, 2)

    shared = value.size(1) // key.size(1)
    q, k = (_normalised(chunked(x)).repeat_interleave(shared, dim=1) for x in (query, key))
    v, beta = chunked(value), chunked(rate)[..., None]
    total = chunked(decay).cumsum(-1)  # logarithm of the decay since the chunk's begin
    between = (total[..., :, None] - total[..., None, :]).masked_fill(_above(size), -torch.inf).exp()
    system = (k * beta) @ k.transpose(-1, -2) * between
    right = torch.cat([v * beta, k * beta * total.exp()[..., None]], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, erased = solved.split([v.size(-1), k.size(-1)], dim=-1)
    scale = k.size(-1) ** -0.5
    within = q @ k.transpose(-1, -2) * between * scale
    reading = q * total.exp()[..., None] * scale
    writing = (k * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
    kept = total[..., -1, None, None].exp()

    state = v.new_zeros(len(lengths), v.size(1), k.size(-1), v.size(-1)) if initial is None else initial
    outputs, last = [], []
    for number, parts in enumerate(zip(*(x.split(steps) for x in (written, erased, within, reading, writing, kept)))):
        new, erasing, inside, reads, writes, keeps = parts
        new = new - erasing @ state
        outputs.append(reads @ state + inside @ new)
        state = state * keeps + writes @ new
        going_on = steps[number + 1] if number + 1 < len(steps) else 0
        state, ended = state.split([going_on, len(state) - going_on])
        last.append(ended)
    output = torch.cat(outputs).transpose(1, 2).flatten(0, 1).index_select(0, index)
    return output.to(value.dtype), torch.cat(last[::-1])


def _chunks(lengths: tuple[int, ...], size: int) -> tuple[list[int], np.ndarray]:
    """(number of pieces that have a first chunk, a second one, …; place of each token among the chunks' tokens)."""
    counts = -(-np.array(lengths) // size)
    steps = (counts[None] > np.arange(counts[0])[:, None]).sum(1)
    first = np.concatenate([[0], np.cumsum(steps)])
    piece = np.repeat(np.arange(len(lengths)), lengths)
    token = np.concatenate([np.arange(length) for length in lengths])
    return steps.tolist(), (first[token // size] + piece) * size + token % size


def _above(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
