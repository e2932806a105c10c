"""Generation against a real engine, compared with transformers."""

from __future__ import annotations

import asyncio
import socket
import time

import psutil
import pytest
import requests
import torch

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout import client as client_module
from spell_megatron.rollout.client import Client
from spell_megatron.rollout.wire import GenerationError

SAMPLING = SamplingConfig(temperature=0.8, top_p=1.0)
EOS = 257


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def run(engines, use, urls=None, **settings):
    """Runs the coroutine use(client) on a client of the engines."""

    async def main():
        arguments = {"stop_token_ids": [EOS], "concurrency": 32} | settings
        sampling = arguments.pop("sampling", SAMPLING)
        async with Client(urls or engines.urls, engines.api_key, sampling, **arguments) as client:
            return await use(client)

    return asyncio.run(main())


def ask(prompt=(72, 101, 108), n=4, seed=1, max_tokens=16, affinity="a", **more):
    return lambda client: client.generate(
        list(prompt), n=n, seed=seed, max_tokens=max_tokens, affinity=affinity, **more
    )


def reference_logprobs(folder, prompt, tokens, temperature) -> torch.Tensor:
    """log softmax(logits / temperature) of each token by transformers in fp32: [tokens]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_logprobs_are_those_of_the_sampled_distribution(engines_for, policy):
    engines = engines_for("dense")
    prompt = list(range(40, 100))
    completions = run(engines, ask(prompt, n=8, max_tokens=40))
    worst = 0.0
    for completion in completions:
        expected = reference_logprobs(policy("dense"), prompt, completion.token_ids, SAMPLING.temperature)
        worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    assert worst <= 1e-4  # 7e-6 measured


def test_of_a_burst_of_answers_one_is_read_in_each_turn_of_the_event_loop(monkeypatch):
    turn, read_in = 0, []

    async def answered(*request):
        return b""

    def read(answer, routed_prompt):
        read_in.append(turn)
        return []

    async def main():
        nonlocal turn
        client = Client(["http://127.0.0.1:1"], "key", SAMPLING, stop_token_ids=[EOS])
        monkeypatch.setattr(client, "_watched", answered)
        requests_made = asyncio.gather(*(ask()(client) for _ in range(20)))
        while not requests_made.done():
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(client_module, "read_answer", read)
    asyncio.run(main())
    assert len(read_in) == 20 and len(set(read_in)) == 20


def test_seeds(engines_for):
    engines = engines_for("dense")

    async def use(client):
        first = await ask(n=8, seed=5)(client)
        again = await ask(n=8, seed=5)(client)
        neighbour = await ask(n=8, seed=6)(client)
        fewer = await ask(n=3, seed=5)(client)
        return first, again, neighbour, fewer

    first, again, neighbour, fewer = run(engines, use)
    tokens = [tuple(c.token_ids) for c in first]
    assert len(set(tokens)) == 8
    assert tokens == [tuple(c.token_ids) for c in again]
    assert tokens[:3] == [tuple(c.token_ids) for c in fewer]
    assert not set(tokens) & {tuple(c.token_ids) for c in neighbour}


def test_more_samples_than_the_engine_takes_at_a_time(engines_for):
    engines = engines_for("dense")
    whole = run(engines, ask(n=20), concurrency=32)
    cut = run(engines, ask(n=20), concurrency=8)
    assert [c.token_ids for c in cut] == [c.token_ids for c in whole]
    assert len(run(engines, ask(n=40, max_tokens=2))) == 40  # more than --max-num-seqs 32


def test_a_prompt_repeated_among_many_others_gives_the_same_tokens(engines_for):
    engines = engines_for("dense")
    alone = run(engines, ask(seed=9))

    async def use(client):
        # More prompt tokens than the engine takes in a step.
        others = [ask([index, *range(200)] * 3, seed=index)(client) for index in range(40)]
        return (await asyncio.gather(ask(seed=9)(client), *others))[0]

    assert [c.token_ids for c in run(engines, use)] == [c.token_ids for c in alone]


def test_greedy(engines_for, policy):
    from transformers import AutoModelForCausalLM

    engines = engines_for("dense")
    prompt = list(range(50, 70))
    first, second = run(engines, ask(prompt, n=2, greedy=True, max_tokens=12))
    model = AutoModelForCausalLM.from_pretrained(policy("dense"), dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert first == second
    assert list(first.token_ids) == expected[0, len(prompt) :].tolist()


def test_finish_reasons(engines_for):
    engines = engines_for("dense")

    def check(completions, stops):
        for c in completions:
            assert len(c.logprobs) == len(c.token_ids) <= 24
            assert (c.finish_reason == "stop") == (c.token_ids[-1] in stops)
            assert not set(c.token_ids[:-1]) & stops
            assert c.finish_reason == "stop" or len(c.token_ids) == 24

    stops = set(range(0, 260, 20)) | {EOS}
    completions = run(engines, ask(n=30, max_tokens=24), stop_token_ids=stops)
    check(completions, stops)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    check(run(engines, ask(n=30, max_tokens=24)), {EOS})


def test_top_p_renormalises(engines_for, policy):
    engines = engines_for("dense")
    sampling = SamplingConfig(temperature=0.8, top_p=0.5)
    completions = run(engines, ask(n=8, max_tokens=20), sampling=sampling)
    for c in completions:
        plain = reference_logprobs(policy("dense"), (72, 101, 108), c.token_ids, 0.8)
        gain = torch.tensor(c.logprobs) - plain
        # Kept mass is at least top_p and at most 1.
        assert float(gain.min()) >= -1e-4 and float(gain.max()) <= -torch.log(torch.tensor(0.5)) + 1e-4
    assert max(max(c.logprobs) for c in completions) <= 0.0


def test_engines_may_leave_out_the_routing_of_the_prompt(engines_for):
    """vLLM returns none at all on CPUs, but takes the request."""
    engines = engines_for("dense")
    completions = run(engines, ask(prompt_routing=False))
    assert [c.token_ids for c in completions] == [c.token_ids for c in run(engines, ask())]
    assert all(completion.routing is None for completion in completions)


def running(engines) -> float:
    text = requests.get(
        f"{engines.urls[0]}/metrics", headers={"Authorization": f"Bearer {engines.api_key}"}, timeout=10
    ).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
    )


def test_cancelling_aborts_in_the_engine(engines_for):
    engines = engines_for("dense")

    async def use(client):
        # Without stop tokens most of these run for 900 tokens.
        task = asyncio.create_task(ask(n=16, max_tokens=900)(client))
        while not await asyncio.to_thread(running, engines):
            assert not task.done(), task
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        start = time.monotonic()
        while await asyncio.to_thread(running, engines) > 0:
            assert time.monotonic() - start < 2.0
            await asyncio.sleep(0.02)
        return time.monotonic() - start

    assert run(engines, use, stop_token_ids=[]) < 2.0


def test_refusals_and_timeouts_are_generation_errors(engines_for):
    engines = engines_for("dense")
    with pytest.raises(GenerationError, match="HTTP 400"):
        sampling = SamplingConfig.model_construct(temperature=-1, top_p=1)
        run(engines, ask(max_tokens=1, n=1), sampling=sampling)
    with pytest.raises(GenerationError, match="refused a request"):
        run(engines, ask([5] * 2000, max_tokens=1, n=1))  # longer than --max-model-len
    with pytest.raises(GenerationError, match="request_timeout"):
        run(engines, ask(n=16, max_tokens=900), stop_token_ids=[], request_timeout=0.3)


def test_a_dead_replica_is_replaced_and_affinity_holds(engines_for):
    engines = engines_for("dense")
    alive, dead = engines.urls[0], free_url()

    async def use(client):
        chosen = {str(key): client._choose(str(key)).url for key in range(64)}
        assert chosen == {key: client._choose(key).url for key in chosen}
        counts = list(chosen.values()).count(alive)
        assert 16 <= counts <= 48
        orphan = next(key for key, url in chosen.items() if url == dead)
        answer = await ask(affinity=orphan)(client)
        assert all(client._choose(key).url == alive for key in chosen)
        return answer

    assert run(engines, use, urls=[alive, dead]) == run(engines, ask())


def test_no_replica_at_all_is_a_user_error(engines_for, monkeypatch):
    monkeypatch.setattr("spell_megatron.rollout.client._RETRY_SECONDS", (0.01, 0.01))
    url = free_url()
    with pytest.raises(UserError, match=f"No engine answers.*{url}"):
        run(engines_for("dense"), ask(), urls=[url])
    engines = engines_for("dense")
    monkeypatch.setattr(engines, "api_key", "wrong")
    with pytest.raises(UserError, match="API key"):
        run(engines, ask())


def test_an_engine_that_hangs_is_given_up(engines_for):
    """Its core is stopped in mid-generation, and goes on when the client asks for engines to be revived."""
    engines = engines_for("dense")
    whole = run(engines, ask(max_tokens=200))
    server = psutil.Process(engines.source.servers[0].process.pid)
    core = [child for child in server.children(recursive=True) if "EngineCore" in child.name()]
    revived = []

    def revive() -> list[str]:
        for process in core:
            process.resume()
        revived.append(engines.engines[0].healthy())
        return engines.urls

    async def stopped(client: Client):
        request = asyncio.ensure_future(ask(max_tokens=200)(client))
        await asyncio.sleep(0.1)
        for process in core:
            process.suspend()
        return await request

    assert core
    try:
        again = run(engines, stopped, hang_timeout=1.0, revive=revive)
        with pytest.raises(UserError, match=r"does not answer within 1 s \(rollout.hang_timeout\)"):
            run(engines, stopped, hang_timeout=1.0)
    finally:
        for process in core:
            process.resume()
    assert revived == [True]
    assert [c.token_ids for c in again] == [c.token_ids for c in whole]


def test_thousands_of_waiting_requests_open_few_connections(engines_for):
    engines = engines_for("dense")

    def connections() -> int:
        return len(psutil.Process().net_connections("tcp"))

    async def use(client):
        most, before = 0, connections()  # those of other tests
        requests = (ask([i % 250, i // 250], n=1, max_tokens=1) for i in range(1000))
        tasks = [asyncio.create_task(request(client)) for request in requests]
        while not all(task.done() for task in tasks):
            most = max(most, connections() - before)
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
        return most

    assert 1 < run(engines, use, concurrency=16) <= 16 + 4
