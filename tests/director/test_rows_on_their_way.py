"""The rows of an update, from the director's process to the trainer."""

import socket
from array import array

import numpy as np
import pytest

from spell_megatron.director.messages import FromDirector, RolledOut, pack_rows, unpack_rows
from spell_megatron.processes.channel import Channel
from spell_megatron.selfplay.batch import Sample


def sample(role, prompt, response, advantage, routing=None):
    logprobs = array("f", [-0.1 * i for i in range(len(response))])
    ids = array("i", response)
    return Sample("1.0", "g", role, "doc_mc", "c", prompt, ids, logprobs, "0", 0.0, advantage, routing=routing)


@pytest.mark.parametrize("routed", [False, True])
def test_rows_are_those_of_their_samples(routed):
    rng = np.random.default_rng(0)
    prompt, other = array("i", [5, 6, 7]), array("i", [5, 6, 7, 8])

    def routing(tokens):
        return rng.integers(0, 60, (tokens, 3, 2), dtype=np.uint8) if routed else None

    samples = [
        sample("responder", prompt, [1, 2], 0.5, routing(4)),
        sample("responder", prompt, [3], -0.25, routing(0)),
        sample("questioner", other, [4, 9, 9], 1 / 3, routing(6)),
        sample("verifier", prompt, [], 0.1),
    ]
    packed, arrays = pack_rows(samples, {"questioner": 0.5})
    assert sum(one.nbytes for one in arrays if one.dtype == np.int32) == 4 * (3 + 4 + 6)  # each prompt once
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours, FromDirector).send(RolledOut(packed, {"a": 1.0}, 2.0), arrays)
        message, received = Channel(theirs, FromDirector).receive()
    assert (message.metrics, message.ended) == ({"a": 1.0}, 2.0)
    rows = unpack_rows(message.rows, received)
    for row, one in zip(rows, samples, strict=True):
        assert row.tokens.tolist() == [*one.prompt_ids, *one.response_ids] and row.tokens.dtype == np.int64
        assert row.prompt_length == len(one.prompt_ids)
        weight = np.float32(one.advantage * (0.5 if one.role == "questioner" else 1.0))
        assert row.weights.tolist() == [weight] * len(one.response_ids) and row.weights.dtype == np.float32
        assert row.rollout_logprobs.tolist() == list(one.logprobs)
        if one.routing is None:
            assert row.routing is None
        else:
            assert (row.routing == one.routing).all() and row.routing.dtype == one.routing.dtype


def test_no_rows():
    assert unpack_rows(*pack_rows([], {})) == []
