"""Requests of a step: their seeds, and the weights that may answer them."""

import asyncio
import threading

import pytest
from scripted import ScriptedPolicy, make_selfplay, roll, summary
from simulated_run import Bytes

from spell_megatron.errors import UserError


def test_rows_of_another_weight_version_are_refused(prompts):
    with pytest.raises(UserError, match="mixed versions"):
        roll(make_selfplay(prompts), ScriptedPolicy(version="0"))


def test_seeds_differ_between_all_requests(prompts):
    policy = ScriptedPolicy()
    roll(make_selfplay(prompts), policy)
    seeds = [seed for *_, seed, _ in policy.requests]
    assert len(set(seeds)) == len(seeds)


def test_the_event_loop_goes_on_while_prompts_are_tokenised(prompts):
    """A tokenizer that waits for the event loop with each prompt would wait for ever inside it."""

    class Patient(Bytes):
        def __init__(self) -> None:
            self.threads, self.loop, self.busy = set(), None, threading.Lock()

        def prompt_ids(self, text, documents=()):
            assert self.busy.acquire(blocking=False)  # one prompt at a time
            turned = threading.Event()
            self.loop.call_soon_threadsafe(turned.set)
            assert turned.wait(20)
            self.busy.release()
            self.threads.add(threading.get_ident())
            return super().prompt_ids(text)

    selfplay = make_selfplay(prompts)
    selfplay.tokenizer = Patient()

    async def rolled():
        selfplay.tokenizer.loop = asyncio.get_running_loop()
        return await selfplay.roll_out(ScriptedPolicy(), 1, "1")

    rollout = asyncio.run(rolled())
    assert rollout.batch and summary(rollout) == summary(roll(make_selfplay(prompts), ScriptedPolicy()))
    assert len(selfplay.tokenizer.threads) == 1 and threading.get_ident() not in selfplay.tokenizer.threads


def test_documents_are_named_in_the_order_in_which_their_prompts_show_them(prompts):
    class Noting(Bytes):
        def __init__(self) -> None:
            self.documents = []

        def prompt_ids(self, text, documents=()):
            ends = [text.index(document) + len(document) for document in documents]
            assert ends == sorted(ends) and text.count("Document ") == len(documents)
            self.documents.append(documents)
            return super().prompt_ids(text)

    settings = {"gate": {"enabled": True}, "responder": {"shuffle_documents": True}}
    selfplay = make_selfplay(prompts, **settings)
    selfplay.tokenizer = Noting()
    assert roll(selfplay, ScriptedPolicy()).samples
    assert {len(documents) for documents in selfplay.tokenizer.documents} == {0, 5, 7}
