"""vLLM's routes take what the trainer sends them, and hand it on as it is meant."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from torch.multiprocessing import reductions

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.rollout.client import Client, Completion
from spell_megatron.rollout.engine import Engine, _describe
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL, NcclChannel
from spell_megatron.rollout.transports.transport import Transport
from spell_megatron.weights.check import _version
from spell_megatron.weights.push import WeightPusher

KEY = "the key of the engines"
STREAM = [("a", torch.zeros(3, 4)), ("b", torch.ones(5, dtype=torch.bfloat16)), ("c", torch.ones(2, 2))]


class Routes(Engine):
    """A process of `vllm_routes.py`."""

    def told(self) -> list[tuple[str, dict]]:
        """What its engine was told since the last look."""
        return [(name, values) for name, values in self.get("/told")]


@pytest.fixture(scope="module")
def routes(with_vllm) -> Iterator[Routes]:
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("vllm_routes.py")],
        env=with_vllm | {"VLLM_API_KEY": KEY, **IPC.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        port = next((line.split()[1] for line in process.stdout if line.startswith("PORT ")), None)
        assert port, "vLLM's routes cannot be served"
        yield Routes(f"http://127.0.0.1:{port}", KEY)
        process.stdin.close()


@pytest.fixture
def no_gpu(monkeypatch) -> list[dict]:
    """The places of the calls that need a GPU; returns where NCCL's communicators are made."""
    from vllm.distributed.weight_transfer import nccl_common

    places: list[dict] = []

    def meet(place: dict) -> SimpleNamespace:
        places.append(place)
        return SimpleNamespace(destroy=lambda: None)

    move = torch.Tensor.to
    monkeypatch.setattr(nccl_common, "trainer_init", meet)
    monkeypatch.setattr(NcclChannel, "send", lambda channel, bucket: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: t if a[:1] == ("cuda",) else move(t, *a, **k))
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (None, tensor.tolist()))
    return places


@pytest.fixture
def engines(routes) -> Callable[[Transport], Engines]:
    """engines(transport): one engine that takes weights by it, and has not been told anything yet."""

    def get(transport: Transport) -> Engines:
        routes.post("/transfer", params={"backend": transport.name})
        routes.told()
        some = Engines.__new__(Engines)
        some.engines, some.transport = [routes], transport
        return some

    return get


def push(engines: Engines, **options) -> None:
    pusher = WeightPusher(engines, bucket_bytes=60)
    assert pusher.push(iter(STREAM), "7", **options).tensors == 3
    pusher.close()


def around(transfers: list[str]) -> list[str]:
    """What an engine is told in a push with such transfers, in order."""
    return [
        *("spell_describe", "init_weight_transfer_engine", "pause_scheduler_async", "set_weight_version_async"),
        *("start_weight_update", "spell_watch_update", *transfers, "spell_report_update", "finish_weight_update"),
        *("reset_prefix_cache_async", "set_weight_version_async", "resume_scheduler_async"),
    ]


BUCKETS = [
    {"names": ["a", "b"], "dtype_names": ["float32", "bfloat16"], "shapes": [[3, 4], [5]]},
    {"names": ["c"], "dtype_names": ["float32"], "shapes": [[2, 2]]},
]


def test_a_push_by_nccl(routes, engines, no_gpu):
    push(engines(NCCL), running="abort")
    told = routes.told()
    assert [name for name, _ in told] == around(["update_weights"] * 2)
    ((place),) = no_gpu
    invited = told[1][1]["init_info"]
    assert {name: invited[name] for name in place} == place and place["world_size"] == 3
    assert (invited["rank_offset"], invited["packed"]) == (1, True)
    assert (invited["packed_buffer_size_bytes"], invited["packed_num_buffers"]) == (60, 2)
    assert told[2][1]["mode"] == "abort"
    assert [told[n][1]["weight_version"] for n in (3, -2)] == ["updating to 7", "7"]
    assert told[5][1] == {"checksums": "no"}
    for (_, values), bucket in zip(told[6:8], BUCKETS, strict=True):
        assert bucket.items() <= values["update_info"].items()


def test_a_push_by_ipc_between_sleep_and_wake(routes, engines, no_gpu):
    sleepers = engines(IPC)
    sleepers.sleep()
    sleepers.wake("weights")
    push(sleepers)
    sleepers.wake("kv_cache")
    told = routes.told()
    expected = ["sleep_async", "wake_up_async", *around(["update_weights"] * 2), "wake_up_async"]
    assert [name for name, _ in told] == expected
    assert told[0][1] == {"level": 2, "mode": "wait"}
    assert (told[1][1], told[-1][1]) == ({"tags": ["weights"]}, {"tags": ["kv_cache"]})
    assert told[3][1]["init_info"]["packed"] is True
    assert told[4][1]["mode"] == "wait"
    sent = [torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in part]) for part in (STREAM[:2], STREAM[2:])]
    for (_, values), bucket, buffer, sizes in zip(told[8:10], BUCKETS, sent, [[48, 10], [16]], strict=True):
        info = values["update_info"]
        assert bucket.items() <= info.items() and info["tensor_sizes"] == sizes
        assert info["ipc_handles"] == {"GPU-1": buffer.tolist()}


def test_what_a_server_is_asked_about_itself(routes):
    about, paused = _describe(routes, "KEY", "")
    assert (about, paused, _version(routes)) == ({"workers": 2}, False, "7")
    assert routes.healthy() and routes.responds(60)
    assert Engine(routes.url, "another key").healthy()
    with pytest.raises(requests.HTTPError, match="401"):
        Engine(routes.url, "another key").post("/pause")


def test_generation(routes):
    async def ask() -> list[list[Completion]]:
        sampling = SamplingConfig(temperature=0.8, top_p=0.9)
        async with Client([routes.url], KEY, sampling, stop_token_ids=[9, 3], concurrency=4) as client:
            several = await client.generate([40, 41, 42], n=6, seed=3, max_tokens=4, affinity="a")
            best = await client.generate(
                [40, 41], n=1, seed=3, max_tokens=2, affinity="a", greedy=True, prompt_routing=False
            )
            assert await client._probe(routes.url)
            return [several, best]

    routes.told()
    several, (best,) = asyncio.run(ask())
    assert [list(completion.token_ids) for completion in several] == [[5, 6, 7, 8]] * 6
    assert list(several[0].logprobs) == [-1.25, -1.5, -1.75, -2.0] and several[0].weight_version == "1"
    # The whole prompt's routing, or only that of the response; the last token has none.
    assert several[0].routing is not None and several[0].routing.shape == (3 + 4 - 1, 3, 2)
    assert best.routing is not None and best.routing.shape == (2 - 1, 3, 2)

    first, second, greedy, probe = routes.told()
    assert probe == ("spell_describe", {})
    if first[1]["params"]["n"] == 2:  # they are sent together
        first, second = second, first
    seed = first[1]["params"]["seed"]
    common = {"max_tokens": 4, "logprobs": 0, "stop_token_ids": [3, 9], "detokenize": False}
    sampled = {"temperature": 0.8, "top_p": 0.9, "routed_experts_prompt_start": 0} | common
    assert first == ("generate", {"tokens": [40, 41, 42], "params": sampled | {"n": 4, "seed": seed}})
    assert second == ("generate", {"tokens": [40, 41, 42], "params": sampled | {"n": 2, "seed": seed + 4}})
    likeliest = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 2, "routed_experts_prompt_start": 2, "n": 1}
    assert greedy == ("generate", {"tokens": [40, 41], "params": common | likeliest | {"seed": seed}})
