"""The rows of an update: how many of each role, and which negatives."""

import random
from collections import Counter

from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.selfplay.batch import Group, Sample, compose
from spell_megatron.selfplay.outcomes import Outcome


def make(uid, role, task="doc_mc", outcome="mixed", reward=0.0, group=None):
    return Sample(uid, group or uid, role, task, uid, [1], [2], [-0.5], "1", reward, outcome=Outcome(outcome))


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
    return [
        make(f"n{t}{outcome}{i}", "questioner", t, outcome)
        for (t, outcome), count in counts.items()
        for i in range(count)
    ]


def judged(count, n=8):
    return [[make(f"v{i}", "verifier") for _ in range(n)] for i in range(count)]


def test_full_batch_has_the_published_1408_rows():
    groups = groups_of({"doc_mc": 60, "doc_general_qa": 40, "docmath_qa": 28})
    outcomes = {
        ("doc_mc", "bad_format"): 100,
        ("doc_general_qa", "ungrounded"): 100,
        ("docmath_qa", "all_0"): 100,
    }
    batch = compose(groups, negatives_of(outcomes), judged(500), SelfPlayConfig(), random.Random(0))
    assert Counter(f"{row.role}/{row.outcome}" for row in batch) == {
        "responder/mixed": 1024,
        "questioner/mixed": 128,
        "questioner/bad_format": 60,
        "questioner/ungrounded": 40,
        "questioner/all_0": 28,
        "verifier/mixed": 128,
    }
    assert len({id(row) for row in batch}) == len(batch) == 1408


def test_shortage_of_negatives_is_carried_to_the_next_task():
    groups = groups_of({"doc_mc": 5, "docmath_qa": 3})
    outcomes = {
        ("doc_mc", "bad_format"): 1,
        ("docmath_qa", "bad_format"): 50,
        ("doc_general_qa", "bad_format"): 50,
    }
    batch = compose(groups, negatives_of(outcomes), [], SelfPlayConfig(), random.Random(0))
    negatives = Counter(row.task for row in batch if row.outcome != "mixed")
    assert negatives == {"doc_mc": 1, "docmath_qa": 7}  # a task without positives gives none


def test_batch_takes_what_there_is():
    groups = groups_of({"doc_mc": 150})
    batch = compose(groups, negatives_of({("doc_mc", "bad_format"): 10}), judged(3), SelfPlayConfig(), random.Random(0))
    assert Counter(row.role for row in batch) == {"responder": 1024, "questioner": 138, "verifier": 24}
    assert compose([], [], [], SelfPlayConfig(), random.Random(0)) == []
    assert compose([], [], judged(3), SelfPlayConfig(), random.Random(0)) == []


def test_verifier_groups_stay_whole_and_the_first_ones_are_taken():
    batch = compose(groups_of({"doc_mc": 16}), [], judged(40), SelfPlayConfig(groups=16), random.Random(0))
    assert Counter(row.uid for row in batch if row.role == "verifier") == {"v0": 8, "v1": 8}


def test_negatives_can_be_switched_off_or_halved():
    groups, negatives = groups_of({"doc_mc": 8}), negatives_of({("doc_mc", "bad_format"): 50})
    for ratio, expected in [(0, 0), (0.5, 4), (2, 16)]:
        config = SelfPlayConfig(negatives_per_positive=ratio)
        batch = compose(groups, negatives, [], config, random.Random(0))
        assert sum(row.outcome == "bad_format" for row in batch) == expected
