"""The size of the policy, which all plans for it have in common."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.training.cost import training_cost
from spell_megatron.training.policy import Architecture, PolicyModel
from spell_megatron.training.prefix_tree import Cost
from spell_megatron.weights.sizes import ParameterCounts, count_parameters


@dataclass(frozen=True)
class ModelSize:
    """What plans for a policy have in common."""

    policy: PolicyModel
    cost: Cost
    """FLOPs of training."""
    parameters: ParameterCounts

    @classmethod
    def of(cls, policy: PolicyModel) -> ModelSize:
        """The size of a policy, from its config.json alone."""
        return cls(policy, training_cost(policy.arch), count_parameters(policy))

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
