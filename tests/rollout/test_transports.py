"""The channels of transports that need GPUs, as far as they run without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchrun import torchrun

from spell_megatron.rollout.transports import TRANSPORTS
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL
from spell_megatron.rollout.transports.transport import Meeting


def test_vllm_understands_what_its_gpu_backends_are_told(monkeypatch):
    """vLLM's own classes parse the requests of the nccl and ipc channels. Without a GPU the calls that need one are
    left out: the rendezvous, and the handle of a buffer in its memory."""
    pytest.importorskip("vllm", reason="the environment for newer versions of Megatron-Core has no vLLM")
    from vllm.distributed.weight_transfer import ipc_engine, nccl_common, nccl_engine

    bucket = [("a", torch.zeros(3, 4)), ("b", torch.ones(5, dtype=torch.float32))]
    announced = {
        "names": ["a", "b"],
        "dtype_names": ["float32", "float32"],
        "shapes": [[3, 4], [5]],
    }
    invited: list[dict] = []
    groups: list[dict] = []
    monkeypatch.setattr(nccl_common, "trainer_init", groups.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    meeting = Meeting(invited.append, "127.0.0.1", 3, 60.0, 1 << 20)
    channel = NCCL.connect(meeting)
    info = nccl_common.NCCLWeightTransferInitInfo(**invited[0], rank_offset=1)
    assert (info.world_size, info.packed, info.packed_buffer_size_bytes) == (3, True, 1 << 20)
    assert groups == [{"master_address": "127.0.0.1", "master_port": info.master_port, "world_size": 3}]
    nccl_engine.NCCLWeightTransferUpdateInfo(**announced, **channel.prepare(bucket))

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    channel = IPC.connect(meeting)
    assert ipc_engine.IPCWeightTransferInitInfo(**invited[1]).packed
    update = ipc_engine.IPCWeightTransferUpdateInfo(**announced, **channel.prepare(bucket))
    assert update.tensor_sizes == [48, 20] and update.ipc_handles.keys() == {"GPU-1"}
    assert torch.equal(channel._buffer.view(torch.float32), torch.cat([torch.zeros(12), torch.ones(5)]))


def test_trainer_ranks_that_share_their_gpus_tell_of_all_buffers():
    output = torchrun(2, Path(__file__).with_name("ipc_worker.py"), timeout=600)
    # Two ones in float32 are bytes of which 2 x (128 + 63) is the sum.
    for number in (1, 2):
        handles = {f"GPU-{rank}": ("handle of", rank, 3 * number + 382) for rank in range(2)}
        assert output.count(f"RESULT [3, 8] {handles}") == 2


def test_vllm_knows_the_receivers():
    pytest.importorskip("vllm", reason="the environment for newer versions of Megatron-Core has no vLLM")
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    import spell_megatron.rollout.worker  # noqa: F401  (registers ours)

    for name in TRANSPORTS:
        assert issubclass(WeightTransferEngineFactory._registry[name](), WeightTransferEngine)
