"""A push by nccl sends a bucket only after the GPU has made it. The streams are fakes that log what waits for what.

vLLM's own `current_stream` and packed broadcast run. CUDA's streams, events and devices and NCCL's communicator are
replaced. As with CUDA, each thread has a current stream of its own.
"""

from __future__ import annotations

import threading

import pytest
import torch

from spell_megatron.rollout.transports.nccl import NCCL
from spell_megatron.rollout.transports.transport import Meeting

pytest.importorskip("vllm", reason="this environment has no vLLM")

import vllm.platforms
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.platforms.cpu import CpuPlatform
from vllm.utils import torch_utils


class Streams:
    """Fakes of torch.cuda's streams, and a log of waits and broadcasts in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._here = threading.local()
        self._default = self.Stream(self, "default")

    class Stream:
        def __init__(self, of: Streams, name: str) -> None:
            self.of, self.name = of, name

        def synchronize(self) -> None:
            self.of.log.append(f"wait for {self.name}")

        def wait_stream(self, other: Streams.Stream) -> None:
            pass

    def current(self, device: object = None) -> Stream:
        return getattr(self._here, "stream", self._default)

    def set_current(self, stream: Stream) -> None:
        self._here.stream = stream

    def make(self, device: object = None) -> Stream:
        return self.Stream(self, "side")


@pytest.fixture
def streams(monkeypatch) -> Streams:
    fakes = Streams()

    class Event:
        def record(self, stream: Streams.Stream) -> None:
            self._stream = stream

        def synchronize(self) -> None:
            fakes.log.append(f"wait for {self._stream.name}")

    class Within:
        def __init__(self, stream: Streams.Stream) -> None:
            self._stream = stream

        def __enter__(self) -> None:
            self._before = fakes.current()
            torch.cuda.set_stream(self._stream)

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_stream(self._before)

    monkeypatch.setattr(torch.cuda, "current_stream", fakes.current)
    monkeypatch.setattr(torch_utils, "prev_set_stream", fakes.set_current)  # vLLM has replaced torch.cuda.set_stream
    monkeypatch.setattr(torch.cuda, "Stream", fakes.make)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: t if a[:1] == ("cuda",) else real(t, *a, **k))
    return fakes


def test_a_bucket_is_sent_after_the_stream_that_makes_it(streams, monkeypatch):
    class Cuda(CpuPlatform):
        def is_cuda(self) -> bool:
            return True

        def is_cpu(self) -> bool:
            return False

    class Communicator:
        """What vLLM's does with streams: it warms up on the current one, and broadcasts on it."""

        def __init__(self) -> None:
            torch_utils.current_stream()

        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            streams.log.append("broadcast")

    monkeypatch.setattr(vllm.platforms, "_current_platform", Cuda())
    monkeypatch.setattr(torch_utils, "_current_stream_tls", threading.local())
    monkeypatch.setattr(nccl_common, "trainer_init", lambda place: Communicator())
    packed_tensor._get_streams.cache_clear()
    try:
        channel = NCCL.connect(Meeting(lambda info: None, "127.0.0.1", 3, 60.0, 1 << 20))
        making = streams.current()
        making.name = "the stream that makes the bucket"
        streams.log.clear()
        bucket = [("weight", torch.ones(8))]
        channel.prepare(bucket)
        sending = threading.Thread(target=channel.send, args=(bucket,))
        sending.start()
        sending.join()
    finally:
        packed_tensor._get_streams.cache_clear()
    assert "broadcast" in streams.log
    assert "wait for the stream that makes the bucket" in streams.log[: streams.log.index("broadcast")], streams.log
