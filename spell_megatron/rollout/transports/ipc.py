"""To engines on the trainer's own GPUs: CUDA memory shared between processes. The workers' end is vLLM's own."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import torch

from spell_megatron.processes.collective import from_all
from spell_megatron.rollout.transports.transport import Bucket, Meeting, Transport


class IpcChannel:
    """One trainer rank's buffer, which the worker on the same GPU reads.

    Every trainer rank prepares the same buckets. Rank 0 tells the engines where the buffers of all ranks are.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def prepare(self, bucket: Bucket) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        own, fault, buffer = {}, "", None
        try:
            buffer = torch.cat([tensor.to("cuda").contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
            torch.cuda.synchronize()
            own = {str(torch.cuda.get_device_properties(buffer.device).uuid): reduce_tensor(buffer)[1]}
        except RuntimeError as error:
            fault = str(error)
        everyones = from_all((own, fault))  # also with a fault: the other ranks wait here
        # The buffer of the previous bucket is released only now: rank 0 comes here when the engines have read it.
        self._buffer = buffer
        if faults := [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(everyones) if fault]:
            raise RuntimeError("; ".join(faults))
        handles = {gpu: handle for some, _ in everyones for gpu, handle in some.items()}
        return {
            "tensor_sizes": [tensor.nbytes for _, tensor in bucket],
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
