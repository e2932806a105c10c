"""Votes and rewards of the three roles."""

import itertools
import math
import random

import pytest

from spell_megatron.config.selfplay_sections import QuestionerConfig, VerifierConfig
from spell_megatron.selfplay.rewards import (
    admissible,
    judgment_rewards,
    majority,
    mixed,
    questioner_reward,
    responder_reward,
    trainable,
)


def test_majority_on_all_votes_of_eight():
    for yes, no in itertools.product(range(9), range(9)):
        if yes + no > 8:
            continue
        votes = [1] * yes + [0] * no + [-1] * (8 - yes - no)
        expected = None if yes + no < 4 else int(yes > (yes + no) / 2)
        for _ in range(3):
            random.Random(yes * 9 + no).shuffle(votes)
            assert majority(votes) == expected
    assert majority([]) is None


def test_judgments_are_rewarded_for_agreeing():
    assert judgment_rewards([1, 0, -1, 1], 1) == [1, 0, -1, 1]
    assert judgment_rewards([1, 0, -1, 1], 0) == [0, 1, -1, 0]
    assert judgment_rewards([-1, -1, -1, 1], None) == [-1] * 4


@pytest.mark.parametrize(
    ("yes", "no", "rule", "kept"),
    [
        (8, 0, 1, False),
        (7, 1, 1, True),
        (5, 3, 1, True),
        (4, 4, 0, False),
        (3, 5, 0, True),
        (5, 3, 0, False),
        (7, 0, 1, False),
        (3, 2, 1, True),
        (1, 1, 0, False),
    ],
)
def test_verifier_groups_worth_training_on(yes, no, rule, kept):
    votes = [1] * yes + [0] * no + [-1] * (8 - yes - no)
    assert trainable(votes, majority(votes), rule, VerifierConfig()) is kept
    if not kept and majority(votes) == 1 and rule == 0:
        assert trainable(votes, 1, rule, VerifierConfig(require_rule_agreement=False))


def test_a_single_vote_is_trained_on_where_the_rule_check_agrees():
    assert [trainable([v], majority([v]), 1, VerifierConfig()) for v in (1, 0, -1)] == [True, False, False]
    assert [trainable([v], majority([v]), 0, VerifierConfig()) for v in (1, 0, -1)] == [False, True, False]


def test_responder_is_right_by_rule_or_by_verdict():
    assert [responder_reward(r, v) for r, v in [(0, 1), (0, 0), (1, 0), (0, None), (1, None)]] == [
        1,
        0,
        1,
        0,
        1,
    ]


def test_the_variance_reward_is_highest_where_half_of_the_answers_are_right():
    """SPICE, arXiv 2510.24684: exp(-(v - 1/4)^2 / (2 * 0.01)) with the variance v of the answers' rewards."""
    values = [questioner_reward(k / 8, QuestionerConfig(reward="variance")) for k in range(9)]
    assert values[0] == values[8] == 0 and values[4] == 1 and values[1:4] == pytest.approx(values[7:4:-1])
    assert values[2] == pytest.approx(math.exp(-((3 / 16 - 1 / 4) ** 2) / 0.02))
    assert values[1:5] == sorted(values[1:5])


def test_questioner_reward_over_the_paper_values():
    gaussian = [questioner_reward(k / 8, QuestionerConfig()) for k in range(9)]
    assert gaussian == pytest.approx([0, 0.079560, 0.324652, 0.754840, 1, 0.754840, 0.324652, 0.079560, 0], abs=1e-6)
    assert questioner_reward(0.25, QuestionerConfig(reward="azr")) == 0.75
    assert questioner_reward(0.25, QuestionerConfig(reward="r_zero")) == 0.5
    assert questioner_reward(0.0, QuestionerConfig(reward="azr")) == 0  # all wrong: no reward of any kind
    wide = QuestionerConfig(mu=0.3, sigma=0.2)
    assert questioner_reward(0.5, wide) == pytest.approx(math.exp(-0.5))


def test_only_mixed_questions_are_admitted_and_trained_on():
    assert [admissible(m, QuestionerConfig()) for m in (0, 0.125, 0.875, 1)] == [False, True, True, False]
    released = QuestionerConfig(history_low=0.01, history_high=1.01)
    assert [admissible(m, released) for m in (0, 0.125, 1)] == [False, True, True]
    assert mixed([0, 1, 1]) and not mixed([1, 1]) and not mixed([0, 0])
