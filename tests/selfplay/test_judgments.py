"""Which judgments a step trains on: drawn uniformly, whatever the timing, and some of them known early."""

import asyncio
import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import Sample, judgment_groups
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.judgments import JudgmentDraw
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.stream import MixedRate, Stream

CLUSTER = Cluster("c", ("document",), ("d",), "fiction")
END = {"mixed": Outcome.MIXED, "right": Outcome.ALL_1, "bad": Outcome.UNGROUNDED, "error": Outcome.ERROR}
SIZE = 4


def judge(attempt, answers):
    """Give these answers of an attempt judgments that may be trained on."""
    for answer in answers:
        uid = f"1.{attempt.index}"
        row = Sample(uid, f"{uid}/{answer}", "verifier", "doc_mc", "c", [1], [2], [-0.5], "1", 0.0)
        attempt.trainable_judgments[answer] = [row]


def names(judgments):
    return [rows[0].group for rows in judgments]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 20), st.sampled_from([0.0, 0.5, 2.0, 4.0]))
def test_the_draw_is_the_same_in_every_interleaving_and_what_is_said_early_holds(data, wanted, limit, share):
    ends = data.draw(st.lists(st.sampled_from(list(END)), min_size=limit, max_size=limit))
    judged = data.draw(st.lists(st.sets(st.integers(0, SIZE - 1)), min_size=limit, max_size=limit))
    config = SelfPlayConfig(groups=wanted, group_size=SIZE, verifier={"share": share})
    draw = JudgmentDraw(config, seed=7, step=1)

    def played(ticks):
        early = set()

        async def play(attempt):
            for _ in range(ticks[attempt.index]):
                await asyncio.sleep(0)
            attempt.stage = "answers"
            judge(attempt, judged[attempt.index])
            attempt.end(END[ends[attempt.index]])

        stream = Stream(itertools.repeat((CLUSTER, "doc_mc")), play, wanted, limit, MixedRate())
        look = lambda: early.update(names(draw.certain(stream.certain(), stream.possible())))  # noqa: E731
        used = asyncio.run(stream.run(look))
        answers = SIZE * sum(attempt.mixed for attempt in used)
        drawn = names(draw.in_order(used))[: judgment_groups(answers, config)]
        assert early <= set(drawn)
        if ends.count("mixed") >= wanted:
            assert early == set(drawn)  # all are known in the end
        return drawn

    orders = [data.draw(st.lists(st.integers(0, 30), min_size=limit, max_size=limit)) for _ in range(2)]
    first, second = map(played, orders)
    assert first == second


def test_some_judgments_are_certain_while_clusters_are_under_way():
    """Of 20 clusters that have ended and one that has not: few of those judged may still be pushed out."""
    config = SelfPlayConfig(groups=20, group_size=SIZE, verifier={"share": 2.0})
    draw = JudgmentDraw(config, seed=7, step=1)
    attempts = [Attempt(index, CLUSTER, "doc_mc") for index in range(21)]
    for attempt in attempts[1:]:
        judge(attempt, range(SIZE))
        attempt.end(Outcome.MIXED)
    before = names(draw.certain(attempts[1:20], attempts))
    attempts[0].end(Outcome.ALL_0)
    after = names(draw.in_order(attempts))[: judgment_groups(20 * SIZE, config)]
    assert len(after) == 40 and set(before) <= set(after) and len(before) >= 30
    assert not draw.certain(attempts, [])  # more may come


def test_each_group_of_judgments_has_the_same_chance():
    config = SelfPlayConfig(group_size=SIZE)
    attempts = [Attempt(index, CLUSTER, "doc_mc") for index in range(10)]
    for attempt in attempts:
        judge(attempt, range(attempt.index % SIZE + 1))
        attempt.end(Outcome.ALL_1)
    counts, draws = Counter(), 2000
    for step in range(draws):
        counts.update(names(JudgmentDraw(config, seed=3, step=step).in_order(attempts))[:6])
    groups = sum(len(attempt.trainable_judgments) for attempt in attempts)
    expected = draws * 6 / groups
    assert len(counts) == groups == 23
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 48.3  # with 22 degrees of freedom one draw in a thousand has more


def test_attempts_that_failed_have_no_judgments_to_train_on():
    attempt = Attempt(0, CLUSTER, "doc_mc")
    judge(attempt, range(SIZE))
    attempt.end(Outcome.ERROR)
    assert not JudgmentDraw(SelfPlayConfig(), 1, 1).in_order([attempt])
