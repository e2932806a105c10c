"""Advantages within groups, tasks and batches."""

import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.selfplay.advantages import assign_advantages
from spell_megatron.selfplay.batch import Sample


def make(uid, role, task="doc_mc", reward=0.0, group=None):
    return Sample(uid, group or uid, role, task, uid, [1], [2], [-0.5], "1", reward)


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
