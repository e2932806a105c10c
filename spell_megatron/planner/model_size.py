"""The size of the policy, which all plans for it have in common, and of a trainer rank's part of it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.cost import training_cost
from spell_megatron.training.policy import Architecture, PolicyModel
from spell_megatron.training.prefix_tree import Cost
from spell_megatron.training.stages import stage_layers
from spell_megatron.weights.names import Layout, rules
from spell_megatron.weights.sizes import ParameterCounts, count_parameters


class Part(NamedTuple):
    """Numbers of parameters of a layer, or of a rank: those that every rank of a stage has, those that
    tensor-parallel ranks share, and those of experts."""

    whole: int = 0
    cut: int = 0
    experts: int = 0


@dataclass(frozen=True)
class ModelSize:
    """What plans for a policy have in common."""

    policy: PolicyModel
    cost: Cost
    """FLOPs of training."""
    parameters: ParameterCounts
    layers: tuple[Part, ...]

    @classmethod
    def of(cls, policy: PolicyModel) -> ModelSize:
        """The size of a policy, from its config.json alone."""
        parts: dict[int | None, list[int]] = defaultdict(lambda: [0, 0, 0])
        for rule in rules(policy).values():
            kind = 2 if rule.expert is not None else int(rule.layout is not Layout.REPLICATED)
            parts[rule.layer][kind] += sum(math.prod(shape) for shape in rule.shapes)
        layers = tuple(Part(*parts[layer]) for layer in range(policy.arch.layers))
        return cls(policy, training_cost(policy.arch), count_parameters(policy), layers)

    @property
    def arch(self) -> Architecture:
        return self.policy.arch

    @property
    def dense_parameters(self) -> int:
        """Parameters outside of the experts."""
        return self.parameters.all - self.parameters.experts

    @property
    def active_parameters(self) -> float:
        """Parameters that a token uses: of the experts only those to which it is sent."""
        share = self.arch.experts_per_token / self.arch.experts if self.arch.experts else 0.0
        return self.dense_parameters + self.parameters.experts * share

    def rank_parameters(self, training: TrainingConfig, stage: int) -> tuple[int, int]:
        """(parameters outside of experts, parameters of experts) on a rank of a pipeline stage."""
        arch, parallel = self.arch, training.parallel
        last = parallel.pipeline - 1
        layers = stage_layers(arch, parallel.pipeline, training.tokens_per_microbatch)[stage]
        own = [self.layers[layer] for layer in layers]
        dense = sum(part.whole + part.cut // parallel.tensor for part in own)
        vocabulary = math.ceil(arch.vocabulary / parallel.tensor) * arch.hidden
        dense += vocabulary * (stage == 0)
        if stage == last:
            dense += arch.hidden + vocabulary * (not arch.tied or last > 0)  # a tied head has a copy of the embedding
        return dense, sum(part.experts for part in own) // (parallel.expert * parallel.expert_tensor)
