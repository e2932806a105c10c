"""How many parameters a policy has, and the bytes that a checkpoint of it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.names import rules


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a whole policy."""

    all: int
    experts: int
    """Parameters of the experts alone."""
    largest_tensor: int
    """Parameters of the largest Hugging Face tensor."""
    pushed: int
    """Number of tensors of a push, with the experts of a layer as two where they can be fused."""


def count_parameters(policy: PolicyModel) -> ParameterCounts:
    """Count the parameters that the policy's config.json describes; reads no weights."""
    table = rules(policy).values()
    sizes = [(rule.expert, math.prod(shape)) for rule in table for shape in rule.shapes]
    return ParameterCounts(
        all=sum(size for _, size in sizes),
        experts=sum(size for expert, size in sizes if expert is not None),
        largest_tensor=max(size for _, size in sizes),
        pushed=sum(len(rule.names) for rule in table if not rule.fuses)
        + len({(rule.layer, rule.layout) for rule in table if rule.fuses}),
    )


def checkpoint_bytes(policy: PolicyModel) -> int:
    """About the size of one checkpoint of a run.

    It holds the weights twice (trainer and Hugging Face) and, for the optimizer, 12 bytes per parameter: a float32
    master weight and two moments.
    """
    return count_parameters(policy).all * (2 * policy.dtype.itemsize + 12)
