"""The GRPO objective against hand-computed values and a scalar re-statement of its formula."""

import math

import numpy as np
import pytest
import torch

from spell_megatron.training.objective import importance_weight, policy_loss


def mean_policy_loss(logprob, old, advantage, dual=3.0):
    return policy_loss(torch.tensor(logprob), torch.tensor(old), torch.tensor(advantage), 0.2, 0.2, dual).mean().item()


@pytest.mark.parametrize(
    "logprob, old, advantage, expected",
    [
        ([-0.693147, -1.386294], [-0.693147, -1.386294], [1.0, 1.0], -1.0),
        ([-0.287682, -0.980829], [-0.693147, -1.386294], [1.0, -1.0], 0.15),
        ([0.916291, 0.223144], [-0.693147, -1.386294], [-1.0, -1.0], 3.0),
    ],
)
def test_hand_computed(logprob, old, advantage, expected):
    """Ratio 1; ratio 1.5, clipped for the positive advantage only; ratio 5, capped by the dual clip."""
    assert mean_policy_loss(logprob, old, advantage) == pytest.approx(expected, abs=1e-5)


def test_against_the_scalar_formula():
    rng = np.random.default_rng(0)
    for _ in range(500):
        log_ratio, advantage = rng.normal() * 2, rng.normal()
        low, high, dual = rng.uniform(0, 0.9), rng.uniform(0, 2), rng.uniform(1.01, 5)
        ratio = math.exp(log_ratio)
        loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
        if advantage < 0:
            loss = min(loss, -advantage * dual)
        found = policy_loss(
            torch.tensor([log_ratio], dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([advantage], dtype=torch.float64),
            low,
            high,
            dual,
        )
        assert found.item() == pytest.approx(loss, rel=1e-12)


def test_gradient_on_policy_is_minus_the_advantage():
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantage = torch.tensor([0.5, -2.0, 0.0])
    policy_loss(logprob, logprob.detach(), advantage, 0.2, 0.2, 3.0).sum().backward()
    torch.testing.assert_close(logprob.grad, -advantage)


def test_importance_weights_are_truncated_and_carry_no_gradient():
    ratio = torch.tensor([0.5, 1.0, 1.9, 2.0, 3.0, 1e30], requires_grad=True)
    weight, capped = importance_weight(ratio.log(), 2.0)
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.0, 1.9, 2.0, 2.0, 2.0]))
    assert capped[[0, 1, 2, 4, 5]].tolist() == [0, 0, 0, 1, 1]  # at the cap itself rounding decides
    assert not weight.requires_grad and not capped.requires_grad


def test_absurd_log_ratios_stay_finite():
    out = policy_loss(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), torch.tensor([-1.0, 1.0]), 0.2, 0.2, 3.0)
    assert torch.isfinite(out).all() and out[0] == 3.0
