"""To engines on the trainer's own GPUs: CUDA memory shared between processes. The workers' end is vLLM's own."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import torch
import torch.distributed as dist

from spell_megatron.rollout.transports.transport import Bucket, Meeting, Transport


class IpcChannel:
    """One trainer rank's buffer, which the worker on the same GPU reads.

    Every trainer rank prepares the same buckets. Rank 0 tells the engines where the buffers of all ranks are.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def prepare(self, bucket: Bucket) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        flat = [tensor.to("cuda").contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
        buffer = torch.cat(flat)
        torch.cuda.synchronize()
        handles = {str(torch.cuda.get_device_properties(buffer.device).uuid): reduce_tensor(buffer)[1]}
        if dist.is_initialized():
            everyones: list[dict] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyones, handles)
            handles = {gpu: handle for some in everyones for gpu, handle in some.items()}
        # The buffer of the previous bucket is released only now: rank 0 comes here when the engines have read it.
        self._buffer = buffer
        return {
            "tensor_sizes": [part.numel() for part in flat],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }

    def send(self, bucket: Bucket) -> None:
        """Sends nothing: the engines read the buffers that `prepare` named."""

    def close(self) -> None:
        self._buffer = None


def connect(meeting: Meeting) -> IpcChannel:
    """The channel of rank 0."""
    meeting.invite({"packed": True})
    return IpcChannel()


IPC = Transport(
    "ipc",
    connect=connect,
    join=IpcChannel,
    colocated=True,
    # Handles of GPU memory travel pickled; only holders of the key can send any.
    environment={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
)
