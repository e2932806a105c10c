"""Which layers each pipeline stage has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from spell_megatron.training.cost import head_flops, layer_flops
from spell_megatron.training.policy import Architecture

PREDICTING = 0.25
"""Share of a row's tokens that predict a token of a response, by which the vocabulary head's work is estimated."""


@cache
def stage_layers(arch: Architecture, stages: int, tokens: int) -> tuple[range, ...]:
    """Numbers of the layers of each stage.

    Where all layers take about the same time, the first stages have one more if they do not divide evenly. Stages of
    hybrid models take about the same time for rows of `tokens` tokens: an attention layer takes the longer for a token
    the longer the row is, and a linear one does not.
    """
    if arch.delta_net:
        return _balanced([layer_flops(arch, layer, tokens) for layer in range(arch.layers)], stages, _head(arch))
    each, more = divmod(arch.layers, stages)
    ends = list(accumulate(each + (stage < more) for stage in range(stages)))
    return tuple(range(first, end) for first, end in zip([0, *ends], ends))


def slowest_stage(arch: Architecture, stages: int, tokens: int) -> float:
    """FLOPs of the slowest stage over those of a stage on average; 1.0 where all layers take about the same time."""
    if not arch.delta_net:
        return 1.0
    costs = [sum(layer_flops(arch, layer, tokens) for layer in own) for own in stage_layers(arch, stages, tokens)]
    costs[-1] += _head(arch)
    return max(costs) * stages / sum(costs)


def _head(arch: Architecture) -> float:
    return PREDICTING * head_flops(arch)


def _balanced(costs: Sequence[float], stages: int, last: float) -> tuple[range, ...]:
    """Consecutive layers of each stage, at least one, so that the largest sum of costs is the smallest possible, and
    then the sum of the squares of the sums.

    last: what the last stage costs beside its layers.
    """
    sums = [0.0, *accumulate(costs)]
    # For the first layers in so many stages: (largest sum, sum of squares, where the last of the stages begins).
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, stages + 1):
        more = last if stage == stages else 0.0
        best.append({})
        for end in range(stage, len(costs) - (stages - stage) + 1):
            choices = []
            for begin in range(stage - 1, end):
                if begin in best[-2]:
                    own = sums[end] - sums[begin] + more
                    largest, squares, _ = best[-2][begin]
                    choices.append((max(largest, own), squares + own**2, begin))
            best[-1][end] = min(choices)
    ends = [len(costs)]
    for stage in range(stages, 0, -1):
        ends.append(best[stage][ends[-1]][2])
    return tuple(range(begin, end) for begin, end in zip(ends[:0:-1], ends[-2::-1]))
