"""Messages with arrays between two processes."""

import socket
import threading

import msgspec
import numpy as np
import pytest

from spell_megatron.processes.channel import Channel


class Number(msgspec.Struct, tag=True):
    value: float


class Name(msgspec.Struct, tag=True):
    name: str


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, Number | Name), Channel(theirs, Number | Name)


def test_messages_and_arrays_arrive_in_order(ends):
    """Also empty arrays, one that is not contiguous, and one that is larger than a socket's buffer."""
    arrays = [
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
        np.zeros((0, 4), dtype=np.int8),
        np.array(1.5, dtype=np.float32),
        np.random.default_rng(0).integers(0, 255, 1 << 22, dtype=np.uint8),
    ]
    sent = [(Number(float("nan")), arrays), (Name("ü"), []), (Number(0.1), arrays[:1])]
    sender = threading.Thread(target=lambda: [ends[0].send(*one) for one in sent])
    sender.start()
    for message, with_it in sent:
        got, beside = ends[1].receive()
        assert repr(got) == repr(message) and len(beside) == len(with_it)
        for one, two in zip(beside, with_it, strict=True):
            assert one.dtype == two.dtype and one.shape == two.shape and (one == two).all()
            one[...] = 0  # it belongs to the receiver
    sender.join()


def test_what_was_sent_before_the_end_arrives(ends):
    ends[0].send(Name("last"))
    ends[0].close()
    assert ends[1].receive()[0] == Name("last")
    with pytest.raises(EOFError):
        ends[1].receive()
    ends[1].send(Name("the other way is open"))
    assert ends[0].receive()[0].name == "the other way is open"


def test_other_messages_are_refused():
    class Other(msgspec.Struct, tag=True):
        value: float

    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours, Other).send(Other(1.0))
        with pytest.raises(msgspec.ValidationError, match="Other"):
            Channel(theirs, Number | Name).receive()
