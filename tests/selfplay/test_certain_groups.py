"""Groups that are certain to be in the batch, before the last one has ended."""

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedPolicy, make_selfplay, summary

from spell_megatron.director.messages import pack_rows, unpack_rows
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.stream import MixedRate, Stream

ENDS = {"mixed": Outcome.MIXED, "right": Outcome.ALL_1, "bad": Outcome.BAD_FORMAT, "error": Outcome.ERROR}


def interleaving(ends, ticks, wanted, limit):
    """What was certain and what was possible while clusters ended in this way and at these times, and what was used."""
    told, possible, running = [], [], set()

    async def play(attempt):
        running.add(attempt.index)
        for _ in range(ticks[attempt.index]):
            await asyncio.sleep(0)
        end = ends[attempt.index]
        attempt.stage = "question" if end == "bad" else "answers"
        attempt.end(ENDS[end])
        running.discard(attempt.index)

    def look():
        for attempt in stream.certain():
            if attempt.index in told:
                continue
            assert attempt.ended
            told.append(attempt.index)
            # What is still under way before it may all become mixed.
            before = [i for i in range(attempt.index) if i in running or ends[i] == "mixed"]
            assert len(before) < wanted
        possible.append([attempt.index for attempt in stream.possible()])

    cluster = Cluster("c", ("document",), ("d",), "fiction")
    stream = Stream(itertools.repeat((cluster, "doc_mc")), play, wanted, limit, MixedRate())
    used = asyncio.run(stream.run(look))
    return told, used, possible


@settings(max_examples=300)
@given(st.data(), st.integers(1, 6), st.integers(1, 25))
def test_what_is_given_early_is_what_the_step_uses_in_every_interleaving(data, wanted, limit):
    """Nothing that the step does not use, everything in the end, and nothing twice; and nothing is used that was said
    to be impossible."""
    ends = data.draw(st.lists(st.sampled_from(list(ENDS)), min_size=limit, max_size=limit))
    ticks = data.draw(st.lists(st.integers(0, 30), min_size=limit, max_size=limit))
    told, used, possible = interleaving(ends, ticks, wanted, limit)
    assert sorted(told) == [attempt.index for attempt in used]
    assert all(set(told) <= set(known) for known in possible if known)
    places = [i for i, end in enumerate(ends) if end == "mixed"]
    assert [attempt.index for attempt in used if attempt.mixed] == places[:wanted]
    assert bool(possible[-1]) == (len(places) >= wanted)


def test_a_group_is_given_while_others_are_under_way():
    """One slow cluster, which may become mixed, holds back only the last of three groups."""
    told, used, _ = interleaving(["mixed", "right", *["mixed"] * 8], [0, 400, *[0] * 8], 3, 10)
    assert told == [0, 2, 1, 3] and len(used) == 4


@pytest.mark.parametrize("settings", [{}, {"responder": {"shuffle_documents": True}}, {"verifier": {"enabled": False}}])
def test_rows_given_early_are_rows_of_the_batch(prompts, settings):
    """With their advantages, in whatever order groups end; the batch is that of a step that waits for everything."""
    expected = None
    for jitter in (0, 1, 2, 3):
        early, pieces, ended = [], [], []

        def final(rows, early=early, pieces=pieces):
            assert len({(row.role, row.group) for row in rows}) == 1
            early.append([(row.uid, row.role, row.response, row.advantage) for row in rows])
            pieces.append(unpack_rows(*pack_rows(rows, {})))

        selfplay = make_selfplay(prompts, **settings)
        work = selfplay.roll_out(ScriptedPolicy(jitter=jitter), 1, "1", lambda *_: ended.append(len(early)), final)
        rollout = asyncio.run(work)
        batch = [(s.uid, s.role, s.response, s.advantage) for s in rollout.batch if s.role != "questioner"]
        assert sorted(row for rows in early for row in rows) == sorted(batch)
        assert len(early) >= 10 and any(0 < count < 10 for count in ended)
        assert [s for s in rollout.batch if s.role == "questioner"] == rollout.late
        expected = expected or summary(rollout)
        assert summary(rollout) == expected
        pieces.append(unpack_rows(*pack_rows(rollout.late, {})))
        whole = [unpack_rows(*pack_rows(rollout.batch, {}))]
        np.testing.assert_allclose(gradient(pieces), gradient(whole), rtol=1e-12, atol=1e-12)


def gradient(pieces):
    """Of a policy with one logit for each token, whatever came before, which is 0: each piece adds its part."""
    total = np.zeros(256)
    for rows in pieces:
        for row in rows:
            np.add.at(total, row.tokens[row.prompt_length :], row.weights.astype(np.float64))
            total -= row.weights.astype(np.float64).sum() / 256
    return total


@pytest.mark.parametrize("untrained", ["responder", "verifier"])
def test_a_role_that_is_not_trained_has_no_rows_early(prompts, untrained):
    early = []
    selfplay = make_selfplay(prompts, untrained=[untrained])
    rollout = asyncio.run(selfplay.roll_out(ScriptedPolicy(), 1, "1", on_final=early.extend))
    assert {row.role for row in early} == {"responder", "verifier"} - {untrained}
    assert {row.role for row in rollout.late} == {"questioner"}


def test_rows_that_the_whole_batch_decides_on_come_last(prompts):
    early = []
    selfplay = make_selfplay(prompts, shuffle_rewards=True)
    rollout = asyncio.run(selfplay.roll_out(ScriptedPolicy(), 1, "1", on_final=early.append))
    assert not early and rollout.late == rollout.batch
