"""vLLM's routes take what the trainer sends them, and hand it on as it is meant."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from torch.multiprocessing import reductions

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.rollout.client import Client
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL, NcclChannel
from spell_megatron.rollout.transports.transport import Transport
from spell_megatron.weights.check import _version
from spell_megatron.weights.push import WeightPusher

pytest.importorskip("vllm", reason="this environment has no vLLM")

ROOT = Path(__file__).parents[2]
KEY = "the key of the engines"
STREAM = [("a", torch.zeros(3, 4)), ("b", torch.ones(5, dtype=torch.bfloat16)), ("c", torch.ones(2, 2))]


class Routes(Engine):
    """A process of `vllm_routes.py`."""

    def told(self) -> list[tuple[str, dict]]:
        """What its engine was told since the last look."""
        return [(name, values) for name, values in self.get("/told")]


@pytest.fixture(scope="module", params=["installed", "vllm"])
def routes(request, contract_sources) -> Iterator[Routes]:
    path = [ROOT] if request.param == "installed" else [contract_sources("vllm"), ROOT]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "VLLM_API_KEY": KEY,
        **IPC.environment,
    }
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("vllm_routes.py")],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        ports = [line.split()[1] for line in iter(process.stdout.readline, "") if line.startswith("PORT ")][:1]
        assert ports, "vLLM's routes cannot be served"
        yield Routes(f"http://127.0.0.1:{ports[0]}", KEY)
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


def pushed(routes: Routes, transport: Transport, **options) -> list[tuple[str, dict]]:
    """What an engine is told when weights are pushed to it, around a rollout."""
    routes.post("/transfer", params={"backend": transport.name})
    engines = Engines.__new__(Engines)
    engines.engines, engines.transport = [routes], transport
    pusher = WeightPusher(engines, bucket_bytes=60)
    assert routes.told() or True
    pusher.push(iter(STREAM), "7", **options)
    engines.sleep()
    engines.wake("weights")
    engines.wake("kv_cache")
    assert _version(routes) is True  # what this engine gives for any answer
    pusher.close()
    return routes.told()
