"""Trainer to engines: a stream of (Hugging Face name, tensor) replaces the weights that they serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import requests
import torch

from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_all, from_rank_0
from spell_megatron.rollout.addresses import address_towards
from spell_megatron.rollout.checksum import checksum
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.transports.transport import Bucket, Channel, Meeting, Transport
from spell_megatron.rollout.wire import UPDATING
from spell_megatron.weights.buckets import BUCKET_BYTES, MOST_BUCKET_BYTES, fitting, in_buckets

Result = TypeVar("Result")


class OtherModel(UserError):
    """The engines' model has other parameters than the trainer's. To push again does not help."""


@dataclass(frozen=True)
class Push:
    """What one push did.

    Attributes:
        tensors, bytes: what was sent, counted once however many engines there are.
        seconds: duration of the push.
        waited: seconds of these until running requests had ended.
        verified: checksums that were compared, one for each tensor and worker.
    """

    tensors: int
    bytes: int
    seconds: float
    waited: float
    verified: int


class WeightPusher:
    """Sends the trainer's weights to every worker of every engine.

    By gloo and nccl, one group connects rank 0 of the trainer with all workers. A bucket is broadcast
    once, however many replicas there are, and each worker takes its own shard out of it. (vLLM's nccl
    backend receives from a single sender.) By ipc, trainer and engines share their GPUs, and each
    worker reads the bucket of the trainer rank on its own GPU. All trainer ranks call the same methods.

    Args:
        engines: the engines on rank 0, None on the others.
        bucket_bytes: size of the buckets in which tensors are sent; None: what `fit_buckets` finds, and before that
            `BUCKET_BYTES`.
        timeout: seconds that the rendezvous, a bucket, or the end of running requests may take.

    Attributes:
        everywhere: whether every trainer rank needs the stream, not rank 0 alone.

    Raises:
        UserError: the engines cannot be connected.
    """

    def __init__(self, engines: Engines | None, *, bucket_bytes: int | None = None, timeout: float = 600.0) -> None:
        self._engines = [] if engines is None else engines.engines
        self._bucket_bytes, self._most = bucket_bytes or BUCKET_BYTES, bucket_bytes or MOST_BUCKET_BYTES
        self._engine_bytes: int | None = None
        self._timeout = timeout
        self._broken = ""
        self._channel: Channel | None = None
        transport = from_rank_0(None if engines is None else engines.transport)
        self.everywhere = transport is not None and transport.join is not None
        if engines is None:
            if transport is not None and transport.join is not None:
                self._channel = transport.join()
            return
        self._threads = ThreadPoolExecutor(len(self._engines) + 1, thread_name_prefix="weights")
        try:
            self._channel = self._connect(engines.transport)
        except (requests.RequestException, RuntimeError, OSError) as error:
            raise UserError(
                f"The engines ({', '.join(engines.urls)}) could not be connected for weight updates: "
                f"{error}. They must be able to reach this process over the network; their logs may say more."
            ) from error

    def fit_buckets(self) -> int:
        """Makes the buckets as large as the memory allows that is free on GPUs now. All trainer ranks call it.

        Returns:
            Their size in bytes, the same on every rank.
        """
        if torch.cuda.is_available():
            free = min(from_all(torch.cuda.mem_get_info()[0]))
            self._bucket_bytes = from_rank_0(fitting(free, self._engine_bytes))
        return self._bucket_bytes

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
                empty on ranks other than 0, unless `everywhere`. Tensors must not be overwritten while the
                stream goes on. Of tied weights one name is enough, as in checkpoints.
            version: the version that completions carry from now on.
            running: wait for requests that are in the engines, or abort them; a client makes these again.
            verify: compare a checksum of each tensor on both sides.

        Returns:
            What was sent, on rank 0.

        Raises:
            UserError: the engines did not take the weights, or received other weights. They are left
                paused and labelled, so that they never serve a mixture; restart them.
            OtherModel: an engine has no parameter for a tensor, or a parameter that got none.
        """
        buckets = in_buckets(stream, self._bucket_bytes)
        if not self._engines:
            self._go_along(buckets)
            return None
        if self._broken:
            self._go_along(buckets)
            raise UserError(f"The engines cannot take weights: {self._broken}")
        self._broken = (
            f"the push of version {version!r} was interrupted. They are paused and hold incomplete weights; "
            "restart them and resume the run from its last checkpoint."
        )
        try:
            result = self._push(buckets, version, running, verify)
        except (requests.RequestException, RuntimeError, OSError) as error:
            self._go_along(buckets)  # the other ranks send the rest of the stream
            kind = OtherModel if isinstance(error, _OtherParameters) else UserError
            raise kind(f"The engines did not take the weights ({error}): {self._broken}") from error
        self._broken = ""
        return result

    def _go_along(self, buckets: Iterable[Bucket]) -> None:
        """Takes part in what all ranks do for the rest of the stream, without sending anything."""
        for bucket in buckets:
            if self._channel and self.everywhere:
                with suppress(RuntimeError):  # that of a rank which cannot prepare; rank 0 tells
                    self._channel.prepare(bucket)

    def close(self) -> None:
        """Ends the connection; the engines keep serving what they have."""
        if self._engines:
            self._threads.shutdown(wait=False)
        if self._channel:
            self._channel.close()

    def _connect(self, transport: Transport) -> Channel:
        """Connects rank 0 with all workers."""
        described = [engine.call("spell_describe") for engine in self._engines]
        workers = [about[0]["workers"] for about in described]
        if not transport.colocated:  # else the trainer sees what is free
            free = [worker.get("free_bytes") for about in described for worker in about]
            self._engine_bytes = min((one for one in free if one is not None), default=None)
        joining: list[Future] = []

        def invite(init_info: dict[str, Any]) -> None:
            for index, engine in enumerate(self._engines):
                place = {"rank_offset": 1 + sum(workers[:index])} if "world_size" in init_info else {}
                body = {"init_info": init_info | place}
                joining.append(self._threads.submit(engine.post, "/init_weight_transfer_engine", body))

        channel = transport.connect(
            Meeting(invite, _own_address(self._engines), 1 + sum(workers), self._timeout, self._most)
        )
        _results(joining)
        return channel

    def _push(self, buckets: Iterable[Bucket], version: str, running: str, verify: bool) -> Push:
        start = time.monotonic()
        self._all("/pause", params={"mode": running})
        waited = time.monotonic() - start
        # Should anybody resume an engine that was left half-way, no completion of it is accepted.
        self._all("/update_weight_version", {"new_version": f"{UPDATING} to {version}"})
        self._all("/start_weight_update")
        self._call_all("spell_watch_update", "yes" if verify else "no")
        sent, size = self._send_all(buckets, verify)
        verified = self._check_reports(sent)
        self._all("/finish_weight_update")
        for engine, answer in zip(self._engines, self._all("/reset_prefix_cache"), strict=True):
            if not answer["success"]:
                raise RuntimeError(f"{engine.url} could not reset its prefix cache")
        self._all("/update_weight_version", {"new_version": version})
        self._all("/resume")
        return Push(len(sent), size, time.monotonic() - start, waited, verified if verify else 0)

    def _send_all(self, buckets: Iterable[Bucket], verify: bool) -> tuple[dict[str, str], int]:
        """Sends the buckets; returns the checksum of each tensor ("" unless `verify`) by its name, and all bytes."""
        sent: dict[str, str] = {}
        size = 0
        loading: list[Future] = []
        for bucket in buckets:
            for name, tensor in bucket:
                if name in sent:
                    raise RuntimeError(f"the stream holds {name} twice")
                sent[name] = checksum(tensor) if verify else ""
                size += tensor.nbytes
            # The workers load a bucket while the next one is produced.
            _results(loading)
            loading = self._send(bucket)
        _results(loading)
        return sent, size

    def _send(self, bucket: Bucket) -> list[Future]:
        """Announces a bucket to all engines and sends it; returns the engines' pending answers."""
        assert self._channel is not None
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
        # An engine that refuses a bucket never joins the broadcast, which would then wait for ever.
        while not transmission.done():
            pending: list[Future] = [answer for answer in loading if not answer.done()]
            wait([transmission, *pending], return_when=FIRST_COMPLETED)
            try:
                _results([answer for answer in loading if answer.done()])
            except requests.RequestException:
                self._channel.close()
                raise
        transmission.result()
        return loading

    def _check_reports(self, sent: dict[str, str]) -> int:
        """Compares what was sent with what each worker received and loaded; returns the number of tensors compared."""
        compared = 0
        for engine, reports in zip(self._engines, self._call_all("spell_report_update"), strict=True):
            for report in reports:
                received, missing = report["received"], report["missing"]
                names = sent.keys() | received.keys()
                wrong = [name for name in names if sent.get(name) != received.get(name)]
                if wrong:
                    name = min(wrong)
                    raise RuntimeError(
                        f"{engine.url} received {len(wrong)} tensors that differ from what was sent, among them "
                        f"{name}: sent {sent.get(name)}, received {received.get(name)}"
                    )
                if missing:
                    raise _OtherParameters(
                        f"the stream did not fill {len(missing)} parameters of {engine.url}, among them {missing[0]}"
                    )
                compared += len(names)
            # Each worker has the experts and layers of its own.
            if unused := set.intersection(*(set(report["unused"]) for report in reports)):
                raise _OtherParameters(
                    f"{engine.url} has no parameter for {len(unused)} tensors, among them {min(unused)}, so that vLLM "
                    "would compute without them. It does not know an option of the model's config.json"
                )
        return compared

    def _all(
        self, path: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        return self._each(lambda engine: engine.post(path, body, params=params, timeout=self._timeout))

    def _call_all(self, method: str, *args: str) -> list[list]:
        return self._each(lambda engine: engine.call(method, *args, timeout=self._timeout))

    def _each(self, action: Callable[[Engine], Result]) -> list[Result]:
        return _results([self._threads.submit(action, engine) for engine in self._engines])


class _OtherParameters(RuntimeError):
    """An engine lacks a parameter for a tensor, or a tensor for a parameter."""


def _own_address(engines: Sequence[Engine]) -> str:
    """An address of this machine that all engines reach; one of the loopback only if all of them are here."""
    addresses = [address_towards(urlsplit(engine.url).hostname or "") for engine in engines]
    routed = [own for own in addresses if not own.startswith("127.") and own != "::1"]
    return (routed or addresses)[0]


def _results(futures: Sequence[Future[Result]]) -> list[Result]:
    return [future.result() for future in futures]
