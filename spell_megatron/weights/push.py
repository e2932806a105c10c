"""Trainer to engines: a stream of (Hugging Face name, tensor) replaces the weights they serve.

The trainer's process imports nothing of vLLM for the gloo backend: the protocol is HTTP and a
process group. The nccl backend uses vLLM's own sender.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

import requests
import torch
import torch.distributed as dist

from spell_megatron.errors import UserError
from spell_megatron.rollout.client import UPDATING
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.transfer import address_towards, broadcast, checksum, gloo_group, listen

BUCKET_BYTES = 64 << 20

Bucket = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Push:
    """What one push did.

    Attributes:
        tensors, bytes: what was sent, counted once.
        seconds: the whole of it.
        waited: seconds of these until the engines stood still (the tail of running requests).
        verified: checksums that were compared, one for each tensor and worker.
    """

    tensors: int
    bytes: int
    seconds: float
    waited: float
    verified: int


class WeightPusher:
    """Sends the trainer's weights to every worker of every engine.

    By gloo and nccl, one group connects rank 0 of the trainer with all workers; a bucket is broadcast
    once, however many replicas there are, and each worker takes its own shard out of it. (vLLM's nccl
    backend receives from a single sender.) By ipc, trainer and engines share their GPUs, and each
    worker reads the bucket of the trainer rank on its own GPU. All trainer ranks call the same methods.

    Args:
        engines: the engines on rank 0, None on the others.
        bucket_bytes: tensors are sent in buckets of about this size; a larger tensor has a bucket
            of its own. Neither side holds more than two buckets and one incomplete layer.
        timeout: seconds that the rendezvous, a bucket, or the end of running requests may take.

    Attributes:
        everywhere: whether the stream has to come on every trainer rank, not on rank 0 alone.

    Raises:
        UserError: the engines cannot be connected.
    """

    def __init__(self, engines: Engines | None, *, bucket_bytes: int = BUCKET_BYTES, timeout: float = 600.0) -> None:
        self._engines = [] if engines is None else engines.engines
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout
        self._broken = ""
        shared = [engines is not None and engines.weight_transfer == "ipc"]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)
        self.everywhere = shared[0]
        if engines is None:
            self._channel = _IpcChannel() if self.everywhere else None
            return
        self._threads = ThreadPoolExecutor(len(self._engines) + 1, thread_name_prefix="weights")
        try:
            self._channel = self._connect(engines.weight_transfer)
        except (requests.RequestException, RuntimeError, OSError) as error:
            raise UserError(
                f"The engines ({', '.join(engines.urls)}) could not be connected for weight updates: "
                f"{error}. They must be able to reach this process over the network; their logs may say more."
            ) from error

    def push(
        self,
        stream: Iterable[tuple[str, torch.Tensor]],
        version: str,
        *,
        running: Literal["wait", "abort"] = "wait",
        verify: bool = False,
    ) -> Push | None:
        """Replaces the weights of all engines and labels them with a version.

        Called on every trainer rank.

        Args:
            stream: every weight of the model under its Hugging Face name, best ordered by layer;
                on ranks but 0 empty, unless `everywhere`. Tensors must not be overwritten while the
                stream goes on. Tied weights may be left out once, as in checkpoints.
            version: the version that completions carry from now on.
            running: let requests that are in the engines end, or abort them.
            verify: compare a checksum of each tensor on both sides.

        Returns:
            What was sent, on rank 0.

        Raises:
            UserError: the engines did not take the weights, or took other ones. They are left
                paused and labelled, so that they never serve a mixture; restart them.
        """
        if not self._engines:
            for bucket in _buckets(stream, self._bucket_bytes):
                if self._channel:
                    self._channel.prepare(bucket)
            return None
        if self._broken:
            raise UserError(f"The engines cannot take weights: {self._broken}")
        self._broken = (
            f"the push of version {version!r} was interrupted. They are paused and hold incomplete weights; "
            "restart them and resume the run from its last checkpoint."
        )
        try:
            result = self._push(stream, version, running, verify)
        except (requests.RequestException, RuntimeError, OSError) as error:
            raise UserError(f"The engines did not take the weights ({error}): {self._broken}") from error
        self._broken = ""
        return result

    def close(self) -> None:
        """Ends the connection; the engines keep serving what they have."""
        if self._engines:
            self._threads.shutdown(wait=False)
        if self._channel:
            self._channel.close()

    def _connect(self, backend: str) -> _Channel:
        workers = [engine.call("spell_describe")[0]["workers"] for engine in self._engines]
        world_size = 1 + sum(workers)
        hosts = [urlsplit(engine.url).hostname or "" for engine in self._engines]
        addresses = [address_towards(host) for host in hosts]
        routed = [own for own in addresses if not own.startswith("127.") and own != "::1"]
        address = (routed or addresses)[0]
        if backend not in ("gloo", "nccl", "ipc"):
            raise UserError(
                f"The engines receive weights by {backend!r}, which this trainer cannot send by. Start them "
                'with --weight-transfer-config {"backend": "nccl"} (or "gloo" on CPUs).'
            )
        joining: list[Future] = []

        def invite(init_info: dict) -> None:
            for index, engine in enumerate(self._engines):
                place = {"rank_offset": 1 + sum(workers[:index])} if "world_size" in init_info else {}
                body = {"init_info": init_info | place}
                joining.append(self._threads.submit(engine.post, "/init_weight_transfer_engine", body))

        if backend == "gloo":
            channel = _GlooChannel(invite, address, world_size, self._timeout)
        elif backend == "nccl":
            channel = _NcclChannel(invite, address, world_size, self._bucket_bytes)
        else:
            channel = _IpcChannel(invite)
        for future in joining:
            future.result()
        return channel

    def _push(self, stream: Iterable[tuple[str, torch.Tensor]], version: str, running: str, verify: bool) -> Push:
        start = time.monotonic()
        self._all("/pause", mode=running)
        waited = time.monotonic() - start
        # Should anybody resume an engine that was left half-way, no completion of it is accepted.
        self._all("/update_weight_version", {"new_version": f"{UPDATING} to {version}"})
        self._call_all("spell_watch_update", "yes" if verify else "no")
        self._all("/start_weight_update")
        sent: dict[str, str] = {}
        size = 0
        loading: list[Future] = []
        for bucket in _buckets(stream, self._bucket_bytes):
            for name, tensor in bucket:
                if name in sent:
                    raise RuntimeError(f"the stream holds {name} twice")
                sent[name] = checksum(tensor) if verify else ""
                size += tensor.nbytes
            # The workers load a bucket while the next one is produced.
            _results(loading)
            loading = self._send(bucket)
        _results(loading)
        verified = self._check_reports(sent)
        self._all("/finish_weight_update")
        for engine, answer in zip(self._engines, self._all("/reset_prefix_cache"), strict=True):
            if not answer["success"]:
                raise RuntimeError(f"{engine.url} could not reset its prefix cache")
        self._all("/update_weight_version", {"new_version": version})
        self._all("/resume")
        return Push(len(sent), size, time.monotonic() - start, waited, verified if verify else 0)

    def _send(self, bucket: Bucket) -> list[Future]:
        """Announces a bucket to all engines and sends it; returns the engines' pending answers."""
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            **self._channel.prepare(bucket),
        }
        loading = [
            self._threads.submit(engine.post, "/update_weights", {"update_info": info}, timeout=self._timeout)
            for engine in self._engines
        ]
        transmission = self._threads.submit(self._channel.send, bucket)
        # An engine that refuses a bucket never joins the broadcast, which would then wait in vain.
        while not transmission.done():
            wait([transmission, *(f for f in loading if not f.done())], return_when=FIRST_COMPLETED)
            try:
                _results([future for future in loading if future.done()])
            except requests.RequestException:
                self._channel.close()
                raise
        transmission.result()
        return loading

    def _check_reports(self, sent: dict[str, str]) -> int:
        """Compares what was sent with what each worker received; returns the number of comparisons."""
        compared = 0
        for engine, reports in zip(self._engines, self._call_all("spell_report_update"), strict=True):
            for report in reports:
                received, missing = report["received"], report["missing"]
                names = sent.keys() | received.keys()
                wrong = [name for name in names if sent.get(name) != received.get(name)]
                if wrong:
                    name = min(wrong)
                    raise RuntimeError(
                        f"{engine.url} received {len(wrong)} tensors other than they were sent, among them "
                        f"{name}: sent {sent.get(name)}, received {received.get(name)}"
                    )
                if missing:
                    raise RuntimeError(
                        f"the stream did not fill {len(missing)} parameters of {engine.url}, among them {missing[0]}"
                    )
                compared += len(names)
        return compared

    def _all(self, path: str, body: dict | None = None, **params: str) -> list[dict]:
        return self._each(lambda engine: engine.post(path, body, timeout=self._timeout, **params))

    def _call_all(self, method: str, *args: str) -> list[list]:
        return self._each(lambda engine: engine.call(method, *args, timeout=self._timeout))

    def _each(self, action) -> list:
        return _results([self._threads.submit(action, engine) for engine in self._engines])


def _results(futures: list[Future]) -> list:
    return [future.result() for future in futures]


def _buckets(stream: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    bucket: Bucket = []
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket


class _Channel(Protocol):
    """How the bytes of a bucket reach the workers."""

    def prepare(self, bucket: Bucket) -> dict:
        """What the engines are told of a bucket, beside names, dtypes and shapes."""

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> None: ...


class _GlooChannel:
    """Broadcast of the tensors one by one on CPUs; its other end is `worker.GlooWeightTransferEngine`."""

    def __init__(self, invite, address: str, world_size: int, timeout: float) -> None:
        listener = listen(address)
        port = listener.getsockname()[1]
        invite(
            {
                "master_address": address,
                "master_port": port,
                "world_size": world_size,
                "timeout": timeout,
            }
        )
        self._group = gloo_group(address, port, 0, world_size, timeout, listener)

    def prepare(self, bucket: Bucket) -> dict:
        return {}

    def send(self, bucket: Bucket) -> None:
        # Straight from where the tensors are: to pack them takes nearly as long as to send them.
        sending = []
        for _, tensor in bucket:
            source = tensor.cpu().contiguous()
            sending.append((broadcast(self._group, source), source))
        for work, _ in sending:
            work.wait()

    def close(self) -> None:
        self._group.abort()


class _NcclChannel:
    """vLLM's packed nccl broadcast between GPUs; its other end is vLLM's own nccl backend."""

    _BUFFERS = 2

    def __init__(self, invite, address: str, world_size: int, bucket_bytes: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        with listen(address) as listener:
            port = listener.getsockname()[1]
        place = {"master_address": address, "master_port": port, "world_size": world_size}
        self._geometry = {"buffer_size_bytes": bucket_bytes, "num_buffers": self._BUFFERS}
        invite(place | {"packed": True} | {f"packed_{name}": value for name, value in self._geometry.items()})
        self._device = torch.cuda.current_device()
        self._group = trainer_init(place)
        self._broadcast = packed_nccl_broadcast_producer

    def prepare(self, bucket: Bucket) -> dict:
        return {}

    def send(self, bucket: Bucket) -> None:
        torch.cuda.set_device(self._device)  # of this thread
        tensors = iter([(name, tensor.to("cuda")) for name, tensor in bucket])
        torch.cuda.current_stream().synchronize()  # the broadcast packs on streams of its own
        self._broadcast(tensors, self._group, 0, lambda item: item[1], **self._geometry)

    def close(self) -> None:
        self._group.destroy()


class _IpcChannel:
    """CUDA memory shared with the engines' workers on the same GPUs; its other end is vLLM's own ipc backend.

    Every trainer rank has one and prepares the same buckets; rank 0 tells the engines of all.
    """

    def __init__(self, invite=None) -> None:
        if invite:
            invite({"packed": True})
        self._buffer: torch.Tensor | None = None

    def prepare(self, bucket: Bucket) -> dict:
        from torch.multiprocessing.reductions import reduce_tensor

        flat = [tensor.to("cuda").contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
        buffer = torch.cat(flat)
        torch.cuda.synchronize()
        handles = {str(torch.cuda.get_device_properties(buffer.device).uuid): reduce_tensor(buffer)[1]}
        if dist.is_initialized():
            everyones: list[dict] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyones, handles)
            handles = {gpu: handle for some in everyones for gpu, handle in some.items()}
        # Only now may the buffer of the bucket before go: rank 0 comes here when the engines have read it.
        self._buffer = buffer
        return {
            "tensor_sizes": [part.numel() for part in flat],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }

    def send(self, bucket: Bucket) -> None:
        """Nothing: the engines read the buffers that `prepare` named."""

    def close(self) -> None:
        self._buffer = None
