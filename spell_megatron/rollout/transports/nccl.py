"""To engines on other GPUs: vLLM's packed nccl broadcast. The workers' end is vLLM's own."""

from __future__ import annotations

from typing import Any

import torch

from spell_megatron.rollout.addresses import listen
from spell_megatron.rollout.transports.transport import Bucket, Meeting, Transport

_BUFFERS = 2


class NcclChannel:
    """Rank 0 of a group with the workers of all engines."""

    def __init__(self, meeting: Meeting) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        with listen(meeting.address) as listener:
            port = listener.getsockname()[1]
        place = {"master_address": meeting.address, "master_port": port, "world_size": meeting.world_size}
        self._geometry = {"buffer_size_bytes": meeting.bucket_bytes, "num_buffers": _BUFFERS}
        meeting.invite(place | {"packed": True} | {f"packed_{name}": value for name, value in self._geometry.items()})
        self._device = torch.cuda.current_device()
        self._group = trainer_init(place)
        self._broadcast = packed_nccl_broadcast_producer

    def prepare(self, bucket: Bucket) -> dict[str, Any]:
        # The caller's stream makes the tensors. It is not the stream of the thread that sends: vLLM's `current_stream`
        # has put the caller on a stream of its own.
        self._made = torch.cuda.Event()
        self._made.record(torch.cuda.current_stream())
        return {}

    def send(self, bucket: Bucket) -> None:
        torch.cuda.set_device(self._device)  # of this thread
        self._made.synchronize()
        tensors = iter([(name, tensor.to("cuda")) for name, tensor in bucket])
        torch.cuda.current_stream().synchronize()  # the broadcast packs on streams of its own
        self._broadcast(tensors, self._group, 0, lambda item: item[1], **self._geometry)

    def close(self) -> None:
        self._group.destroy()


NCCL = Transport("nccl", connect=NcclChannel)
