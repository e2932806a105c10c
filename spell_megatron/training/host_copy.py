"""Tensors whose memory leaves the device for the host, and comes back to where all views of it expect it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from spell_megatron.errors import UserError

_ALIGNED = 64
"""Bytes to which copies are aligned in the host's memory, so that any type can be read there."""


class HostCopy:
    """Tensors whose storages can be emptied, with their bytes in host memory meanwhile.

    Tensors stay the objects that they are, with all views: only their storages lose and regain their memory. The host's
    memory is pinned where the tensors are on a GPU. It is as large as what it holds, and is kept for the next time.

    Args:
        tensors: lists the tensors, each time anew. Several may share a storage; those without memory count nothing.
        settings: which to change where memory is short, for users.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], settings: str) -> None:
        self._tensors, self._settings = tensors, settings
        self._host = torch.empty(0, dtype=torch.uint8)
        self._away: dict[int, _Place] = {}
        """By the storage's address."""

    @property
    def away(self) -> bool:
        """Whether some of the tensors are without their memory."""
        return bool(self._away)

    def leave(self) -> None:
        """Copies what has memory to the host and frees it on the device. Does nothing if it has left already.

        If it fails, nothing has left.

        Raises:
            UserError: the host lacks memory.
        """
        if self._away:
            return
        places, needed = [], 0
        for storage in storages(self._tensors()):
            places.append(_Place(storage, needed, storage.nbytes()))
            needed += storage.nbytes() + -storage.nbytes() % _ALIGNED
        if not places:
            return
        device = places[0].storage.device
        if len(self._host) < needed:
            self._host = torch.empty(0, dtype=torch.uint8)  # frees the smaller one first
            self._host = _host_memory(needed, device, self._settings)
        for place in places:
            place.on(self._host).copy_(_bytes(place.storage), non_blocking=True)
        _finish(device)
        self._away = {place.storage._cdata: place for place in places}
        for place in places:
            place.storage.resize_(0)

    def come_back(self) -> None:
        """Gives all storages their memory and their bytes again. Does nothing if they have them.

        If it fails, it can be called again: the host's copy is complete until all have come back.

        Raises:
            UserError: the device lacks memory.
        """
        if not self._away:
            return
        places = list(self._away.values())
        allocate((place.storage, place.size) for place in places)
        for place in places:
            _bytes(place.storage).copy_(place.on(self._host), non_blocking=True)
        _finish(places[0].storage.device)
        self._away = {}

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The bytes of a tensor that has left, as a tensor of the host's memory that may be read and written; None if
        it has not left."""
        place = self._away.get(tensor.untyped_storage()._cdata)
        if place is None:
            return None
        flat = place.on(self._host).view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride(), flat.storage_offset() + tensor.storage_offset())


class _Place(NamedTuple):
    """Where in the host's memory the bytes of a storage are."""

    storage: torch.UntypedStorage
    start: int
    size: int

    def on(self, host: torch.Tensor) -> torch.Tensor:
        return host[self.start : self.start + self.size]


def storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    """The storages with memory beneath the tensors, each once, but for those that cannot be emptied.

    Memory of a CPU stays as it is once numpy has looked into it, as for a checkpoint in the Hugging Face format.
    """
    seen = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.resizable() and storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage


def allocate(wanted: Iterable[tuple[torch.UntypedStorage, int]]) -> None:
    """Gives empty storages memory of so many bytes, with whatever it holds.

    Raises:
        UserError: the device lacks memory.
    """
    try:
        for storage, size in wanted:
            storage.resize_(size)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The trainer cannot take its memory of the GPU back, which the engines should have freed ({error}). Lower "
            "rollout.gpu_memory_utilization or training.tokens_per_microbatch, and resume the run."
        ) from error


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish(device: torch.device) -> None:
    """Waits for the copies."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_memory(size: int, device: torch.device, settings: str) -> torch.Tensor:
    """Memory of the host, pinned for copies from and to a GPU.

    It is not torch's pinned memory, which comes in powers of two: up to twice of what is needed.
    """
    try:
        memory = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise _no_memory(size, settings, str(error)) from error
    if device.type == "cuda":
        cuda = torch.cuda.cudart()
        address = memory.data_ptr()
        if status := int(cuda.cudaHostRegister(address, size, 0)):
            raise _no_memory(size, settings, f"CUDA error {status}")
        weakref.finalize(memory, cuda.cudaHostUnregister, address)
    return memory


def _no_memory(size: int, settings: str, reason: str) -> UserError:
    return UserError(
        f"A trainer process needs {size / 2**30:.1f} GiB of host memory for what leaves its GPU, and cannot get them "
        f"({reason}). Use nodes with more memory, or change {settings}, and resume the run."
    )
