"""Votes, rewards, advantages, history, batch."""

import itertools
import json
import math
import random
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.config.schema import QuestionerConfig, SelfPlayConfig, VerifierConfig
from spell_megatron.selfplay.advantages import assign_advantages
from spell_megatron.selfplay.batch import Group, Sample, compose, response_length
from spell_megatron.selfplay.history import Entry, History
from spell_megatron.selfplay.rewards import (
    admissible,
    judgment_rewards,
    majority,
    mixed,
    questioner_reward,
    responder_reward,
    trainable,
)


def make(uid, role, task="doc_mc", kind="good", reward=0.0, group=None):
    return Sample(uid, group or uid, role, task, kind, uid, [1], [2], [-0.5], "1", reward)


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


# Advantages


def test_answers_are_normalised_within_their_question():
    rows = [make("u", "responder", reward=r, group="u") for r in [1, 0, 0, 0, 0, 0, 0, 0]]
    other = [make("v", "responder", reward=r, group="v") for r in [1, 1, 1, 0, 0, 0, 0, 0]]
    assign_advantages([row for pair in zip(rows, other, strict=True) for row in pair], "task")
    assert [row.advantage for row in rows] == pytest.approx([2.474867] + [-0.353552] * 7, abs=1e-6)
    assert [row.advantage for row in other] == pytest.approx([1.207612] * 3 + [-0.724567] * 5, abs=1e-6)


def test_questions_are_normalised_per_task_or_over_the_batch():
    rows = [
        make(str(i), "questioner", task, reward=r)
        for i, (task, r) in enumerate([("doc_mc", 1.0), ("doc_mc", 0.0), ("docmath_qa", 0.5)])
    ]
    assign_advantages(rows, "task")
    assert [row.advantage for row in rows] == pytest.approx([0.7071058, -0.7071058, 0], abs=1e-6)
    assign_advantages(rows, "batch")
    assert [row.advantage for row in rows] == pytest.approx([1, -1, 0], abs=1e-5)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["questioner", "responder", "verifier"]),
            st.sampled_from(["doc_mc", "docmath_qa"]),
            st.integers(0, 3),
            st.sampled_from([-1.0, -0.5, 0.0, 0.07956, 1.0]),
        ),
        max_size=40,
    )
)
def test_advantages_are_finite_and_sum_to_zero_in_every_group(specs):
    rows = [make(f"{uid}", role, task, reward=r, group=f"{task}{uid}") for role, task, uid, r in specs]
    assign_advantages(rows, "task")
    assert all(math.isfinite(row.advantage) for row in rows)
    for task in ("doc_mc", "docmath_qa"):
        members = [row.advantage for row in rows if row.role == "questioner" and row.task == task]
        assert not members or abs(fmean(members)) < 1e-6
        if len(members) == 1:
            assert members == [0.0]


# History


def test_history_keeps_the_last_entries_per_task_and_cluster():
    history = History(3)
    for i in range(5):
        assert history.admit("doc_mc", "c", Entry((i,), f"q{i}", "a"))
    assert [entry.question for entry in history.entries("doc_mc", "c")] == ["q2", "q3", "q4"]
    assert history.entries("docmath_qa", "c") == ()
    assert history.depths() == [3]


def test_history_refuses_a_question_it_knows():
    history = History(3)
    assert history.admit("t", "c", Entry((0,), "Who was first?", "a"))
    assert not history.admit("t", "c", Entry((0, 1), " who was  FIRST? ", "b"))
    assert history.admit("t", "other", Entry((0,), "Who was first?", "a"))
    assert len(history.entries("t", "c")) == 1


def test_history_of_capacity_zero_stays_empty():
    history = History(0)
    assert not history.admit("t", "c", Entry((0,), "q", "a"))
    assert history.entries("t", "c") == ()


def test_history_survives_json():
    history = History(2)
    for i in range(3):
        history.admit("t", f"c{i % 2}", Entry((i, i + 1), f"q{i}", "a"))
    restored = History(2)
    restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert restored.entries("t", "c0") == history.entries("t", "c0")
    assert restored.entries("t", "c1") == history.entries("t", "c1")
    assert restored.state_dict() == history.state_dict()


# Batch


def groups_of(counts, n=8):
    return [
        Group(
            f"{t}{i}",
            t,
            make(f"{t}{i}", "questioner", t),
            [make(f"{t}{i}", "responder", t) for _ in range(n)],
        )
        for t, count in counts.items()
        for i in range(count)
    ]


def negatives_of(counts):
    return [make(f"n{t}{k}{i}", "questioner", t, k) for (t, k), count in counts.items() for i in range(count)]


def judged(count, n=8):
    return [[make(f"v{i}", "verifier") for _ in range(n)] for i in range(count)]


def test_full_batch_has_the_published_1408_rows():
    groups = groups_of({"doc_mc": 60, "doc_general_qa": 40, "docmath_qa": 28})
    kinds = {
        ("doc_mc", "bad_format"): 100,
        ("doc_general_qa", "bad_ground"): 100,
        ("docmath_qa", "zero_variance"): 100,
    }
    batch = compose(groups, negatives_of(kinds), judged(500), SelfPlayConfig(), random.Random(0))
    assert Counter(f"{row.role}/{row.kind}" for row in batch) == {
        "responder/good": 1024,
        "questioner/good": 128,
        "questioner/bad_format": 60,
        "questioner/bad_ground": 40,
        "questioner/zero_variance": 28,
        "verifier/good": 128,
    }
    assert len({id(row) for row in batch}) == len(batch) == 1408


def test_shortage_of_negatives_is_carried_to_the_next_task():
    groups = groups_of({"doc_mc": 5, "docmath_qa": 3})
    kinds = {
        ("doc_mc", "bad_format"): 1,
        ("docmath_qa", "bad_format"): 50,
        ("doc_general_qa", "bad_format"): 50,
    }
    batch = compose(groups, negatives_of(kinds), [], SelfPlayConfig(), random.Random(0))
    negatives = Counter(row.task for row in batch if row.kind != "good")
    assert negatives == {"doc_mc": 1, "docmath_qa": 7}  # a task without positives gives none


def test_batch_takes_what_there_is():
    groups = groups_of({"doc_mc": 150})
    batch = compose(groups, negatives_of({("doc_mc", "bad_format"): 10}), judged(3), SelfPlayConfig(), random.Random(0))
    assert Counter(row.role for row in batch) == {"responder": 1024, "questioner": 138, "verifier": 24}
    assert compose([], [], [], SelfPlayConfig(), random.Random(0)) == []
    assert compose([], [], judged(3), SelfPlayConfig(), random.Random(0)) == []


def test_verifier_groups_stay_whole_and_the_draw_depends_on_the_seed_alone():
    groups, judgments = groups_of({"doc_mc": 16}), judged(40)
    config = SelfPlayConfig(groups=16)

    def drawn(seed):
        rows = compose(groups, [], judgments, config, random.Random(seed))
        return Counter(row.uid for row in rows if row.role == "verifier")

    assert set(drawn(1).values()) == {8} and len(drawn(1)) == 2
    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(10)}) > 1


def test_negatives_can_be_switched_off_or_halved():
    groups, negatives = groups_of({"doc_mc": 8}), negatives_of({("doc_mc", "bad_format"): 50})
    for ratio, expected in [(0, 0), (0.5, 4), (2, 16)]:
        config = SelfPlayConfig(negatives_per_positive=ratio)
        batch = compose(groups, negatives, [], config, random.Random(0))
        assert sum(row.kind == "bad_format" for row in batch) == expected


def test_response_ends_with_the_first_end_of_sequence():
    assert response_length([5, 6, 1, 0, 1], {1}) == 3
    assert response_length([5, 6], {1, 2}) == 2
    assert response_length([], {1}) == 0
