"""What goes over the wire: bodies as a server gets them, answers as vLLM writes them."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from array import array

import numpy as np
import pytest
from aiohttp import web

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.rollout.client import Client
from spell_megatron.rollout.wire import Completion, GenerationError, PromptJson, read_answer


def answer_of(*choices: dict) -> bytes:
    return json.dumps({"request_id": "r", "model": "policy", "usage": None, "choices": choices}).encode()


def choice(tokens=(7, 8), **changes) -> dict:
    content = [{"token_id": t, "logprob": -t / 4, "rank": 1, "top_logprobs": []} for t in tokens]
    whole = {
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": list(tokens),
        "logprobs": {"content": content},
        "routed_experts": None,
        "weight_versions": [{"start": 0, "end": len(tokens), "version": "4"}],
    }
    return whole | changes


def generate(*calls: dict, concurrency: int = 4, together: int = 1, answer=lambda body: answer_of(choice())):
    """The completions of calls of `Client.generate` that are made together, and the bodies that the server got.

    The server answers none before so many requests are there `together`.
    """
    bodies = []
    there = asyncio.Event()

    async def serve(request: web.Request) -> web.Response:
        assert request.content_type == "application/json" and request.content_length == len(await request.read())
        bodies.append(await request.json())
        if len(bodies) >= together:
            there.set()
        await there.wait()
        return web.Response(body=answer(bodies[-1]), content_type="application/json")

    async def main() -> list[list[Completion]]:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/inference/v1/generate", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        try:
            sampling = SamplingConfig(temperature=0.8, top_p=0.9)
            async with Client([url], "key", sampling, stop_token_ids=[9, 3], concurrency=concurrency) as client:
                made = await asyncio.gather(*(client.generate(**call) for call in calls))
                assert not client._prompt_json._made
                return made
        finally:
            await runner.cleanup()

    return asyncio.run(main()), sorted(bodies, key=lambda body: body["sampling_params"]["seed"])


@pytest.mark.parametrize("ids", [[40, 150_000, 42], array("i", [40, 150_000, 42])])
def test_a_request_as_the_server_gets_it(ids):
    call = {"prompt_ids": ids, "n": 6, "seed": 3, "max_tokens": 5, "affinity": "a"}
    _, bodies = generate(call)
    common = {"max_tokens": 5, "logprobs": 0, "stop_token_ids": [3, 9], "detokenize": False}
    params = {"temperature": 0.8, "top_p": 0.9} | common
    seed = 2_544_853_721_762_854  # blake2b of "3": other seeds would sample other completions than earlier versions
    assert bodies == [
        {"token_ids": [40, 150_000, 42], "sampling_params": params | {"n": 4, "seed": seed}},
        {"token_ids": [40, 150_000, 42], "sampling_params": params | {"n": 2, "seed": seed + 4}},
    ]
    _, bodies = generate(call | {"greedy": True, "prompt_routing": False})
    greedy = {"temperature": 0.0, "top_p": 1.0, "n": 1, "seed": seed, "routed_experts_prompt_start": 3}
    assert bodies == [{"token_ids": [40, 150_000, 42], "sampling_params": common | greedy}]


def test_what_was_begun_first_is_served_first():
    """A later request of a cluster overtakes those of clusters that came after it, here and in the engine."""
    arrived = []

    def note(body):
        arrived.append((body.get("priority", 0), body["token_ids"][0]))
        return answer_of(choice())

    order = [("a", 0), ("b", 1), ("c", 2), ("b", 3), ("a", 4)]
    calls = [{"prompt_ids": [i], "n": 1, "seed": i, "max_tokens": 1, "affinity": name} for name, i in order]
    generate(*calls, concurrency=1, answer=note)
    assert arrived == [(0, 0), (0, 4), (1, 1), (1, 3), (2, 2)]


def test_a_long_prompt_arrives_whole():
    ids = array("i", range(300_000))
    _, bodies = generate(*({"prompt_ids": ids, "n": 1, "seed": s, "max_tokens": 1, "affinity": ""} for s in range(3)))
    assert len(bodies) == 3 and all(body["token_ids"] == ids.tolist() for body in bodies)


def test_more_requests_than_the_process_may_have_files_open():
    """A machine's default is 1,024 files, and 64 engines are sent thousands of requests at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        calls = [{"prompt_ids": [1], "n": 1, "seed": s, "max_tokens": 1, "affinity": ""} for s in range(100)]
        made, bodies = generate(*calls, concurrency=200, together=100)
        assert len(made) == len(bodies) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_the_hard_limit_of_open_files_is_low_fewer_requests_are_under_way(monkeypatch, caplog):
    """An engine to which no connection can be opened would be taken for one that has died, and be started again."""
    most = len(os.listdir("/proc/self/fd")) + 64 + 10  # the server's side of the connections is not counted
    monkeypatch.setattr(resource, "getrlimit", lambda _: (most, most))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: None)
    under_way, longest = [0], []

    async def answer(*_):
        under_way[0] += 1
        longest.append(under_way[0])
        await asyncio.sleep(0.01)
        under_way[0] -= 1
        return answer_of(choice())

    async def main():
        async with Client(["http://engine"], "", SamplingConfig(), stop_token_ids=[], concurrency=200) as client:
            monkeypatch.setattr(client, "_post", answer)
            calls = (client.generate([1], n=1, seed=seed, max_tokens=1, affinity="") for seed in range(50))
            return await asyncio.gather(*calls)

    assert len(asyncio.run(main())) == 50
    assert 5 <= max(longest) <= 10  # the event loop has some files open too
    assert "too few files open" in caplog.text and "ulimit -Hn" in caplog.text


def test_the_json_of_a_prompt_is_made_once_for_all_requests_under_way():
    ids, equal, prompts = [1, 2, 3], [1, 2, 3], PromptJson()
    with prompts.of(ids) as first:
        with prompts.of(ids) as second:
            assert first == b"[1,2,3]" and second is first
        with prompts.of(ids) as third, prompts.of(equal) as other:
            assert third is first and other == first and other is not first
        with pytest.raises(KeyError), prompts.of(ids):
            raise KeyError
        assert len(prompts._made) == 1
    assert not prompts._made and not prompts._users


def test_answers_are_read_in_their_order_as_arrays():
    reversed_choices = answer_of(choice([5, 6, 7], index=1, finish_reason="length"), choice([1, 2], index=0))
    first, second = read_answer(reversed_choices, 0)
    assert first == Completion(array("i", [1, 2]), array("f", [-0.25, -0.5]), "stop", "4")
    assert second == Completion(array("i", [5, 6, 7]), array("f", [-1.25, -1.5, -1.75]), "length", "4")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answer_of(choice(finish_reason="repetition")), "ended a completion with 'repetition'"),
        (answer_of(choice(finish_reason=None)), "ended a completion with None"),
        (answer_of(choice(weight_versions=None)), r"weight versions \[\]"),
        (answer_of(choice(weight_versions=[{"version": "3"}, {"version": "4"}])), r"weight versions \['3', '4'\]"),
        (answer_of(choice(weight_versions=[{"version": "updating to 4"}])), "weight versions"),
        (answer_of(choice(logprobs=None)), "cannot be read .*logprobs"),
        (answer_of(choice(token_ids=None)), "cannot be read .*token_ids"),
        (answer_of(choice())[:-9], "cannot be read"),
        (b"<html>busy</html>", "cannot be read .*busy"),
    ],
)
def test_answers_that_cannot_be_used(answer, reason):
    with pytest.raises(GenerationError, match=reason):
        read_answer(answer, 0)
    with pytest.raises(GenerationError, match=reason):
        call = {"prompt_ids": [1], "n": 1, "seed": 1, "max_tokens": 1, "affinity": ""}
        generate(call, answer=lambda body: answer)


def test_a_request_that_an_engine_aborts_is_made_again():
    """As one that is told to stop does: none of its work is lost, and no cluster is left out for it."""
    answers = [answer_of(choice(), choice([5], index=1, finish_reason="abort")), answer_of(choice(), choice(index=1))]
    call = {"prompt_ids": [1], "n": 2, "seed": 1, "max_tokens": 2, "affinity": ""}
    (made,), bodies = generate(call, answer=lambda body: answers.pop(0))
    assert [len(one.token_ids) for one in made] == [2, 2] and bodies[0] == bodies[1]


def vllm_answer(routing: np.ndarray) -> bytes:
    """An answer with three tokens, made by vLLM's own code."""
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateTokensChoice, GenerateTokensResponse
    from vllm.utils.serial_utils import numpy2base64

    made = GenerateTokensChoice(
        index=0,
        finish_reason="stop",
        token_ids=[7, 8, 257],
        logprobs={"content": [{"token_id": token, "logprob": -0.5} for token in (7, 8, 257)]},
        routed_experts=numpy2base64(routing),
        weight_versions=[{"start": 0, "end": 3, "version": "4"}],
    )
    return GenerateTokensResponse(choices=[made]).model_dump_json().encode()


def test_routings_are_read_as_vllm_writes_them():
    def routing(tokens: int) -> np.ndarray:
        return np.arange(tokens * 6, dtype=np.uint16).reshape(tokens, 3, 2)

    (completion,) = read_answer(vllm_answer(routing(4 + 2)), routed_prompt=4)
    assert completion.routing.dtype == np.uint16 and completion.weight_version == "4"
    np.testing.assert_array_equal(completion.routing, routing(6))
    (short,) = read_answer(vllm_answer(routing(2)), routed_prompt=0)
    assert len(short.routing) == 2
    with pytest.raises(GenerationError, match="experts of 6 tokens, not of 2"):
        read_answer(vllm_answer(routing(6)), routed_prompt=0)


def test_the_routing_of_a_long_prompt():
    routing = np.random.default_rng(0).integers(0, 128, (80_000 + 2, 16, 4), dtype=np.uint8)
    answer = vllm_answer(routing)
    call = {"prompt_ids": array("i", range(80_000)), "n": 1, "seed": 1, "max_tokens": 1, "affinity": ""}
    (((completion,),), _) = generate(call, answer=lambda body: answer)
    np.testing.assert_array_equal(completion.routing, routing)


def test_the_models_generation_config_does_not_change_how_engines_sample():
    """What a request leaves out is neutral in vLLM's route for token ids, unlike in those of OpenAI's API."""
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    _, (body,) = generate({"prompt_ids": [1, 2], "n": 2, "seed": 3, "max_tokens": 5, "affinity": "a"})
    request = GenerateRequest.model_validate(body)
    params = request.sampling_params
    assert request.is_sampling_param_provided("max_tokens")  # the only one that the route would take from the model
    # What vLLM's engine does with the model's file:
    theirs = {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "repetition_penalty": 9.0, "eos_token_id": 7}
    params.update_from_generation_config(theirs, None)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.8, 0.9, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert sorted(params.stop_token_ids) == [3, 7, 9]  # `PolicyTokenizer.eos_ids` has 7 too
