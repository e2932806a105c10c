"""Context-parallel ranks swap slices of tokens for slices of heads and back (Ulysses, arXiv:2309.14509)."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens / ranks, heads, d] -> [tokens, heads / ranks, d]."""
    ranks = group.size()
    tokens, heads, d = x.shape
    parts = x.view(tokens, ranks, heads // ranks, d).transpose(0, 1).contiguous()
    return all_to_all(group, parts.flatten(0, 1))


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, heads / ranks, d] -> [tokens / ranks, heads, d]."""
    ranks = group.size()
    tokens, heads, d = x.shape
    parts = all_to_all(group, x.contiguous()).view(ranks, tokens // ranks, heads, d)
    return parts.transpose(0, 1).reshape(tokens // ranks, ranks * heads, d)
