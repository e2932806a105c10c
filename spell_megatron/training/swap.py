"""What leaves the trainer's GPUs while engines on the same GPUs work.

Between updates the gradients are dead, and their memory is freed. The optimizer's state and the weights wait in host
memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer

from spell_megatron.training.host_copy import HostCopy, allocate, storages
from spell_megatron.training.optimizer import optimizer_parts

What = Literal["none", "state", "all"]
"""What leaves: nothing; gradients and the optimizer's state; these and the weights."""


class Swap:
    """Moves what one trainer rank holds on its GPU out, and back.

    Its methods only concern this rank. What has left already, or is back already, stays as it is.

    Args:
        model: this rank's part of the policy, with Megatron's gradient buffers.
        optimizer: Megatron's.
        what: leaves.

    Attributes:
        seconds: spent on moving since `seconds` was last set to 0.
    """

    def __init__(self, model: torch.nn.Module, optimizer: MegatronOptimizer, what: What) -> None:
        self._model, self._optimizer, self.what = model, optimizer, what
        self._state = HostCopy(self._state_tensors, "training.swap")
        self._weights = HostCopy(self._weight_tensors, "training.swap")
        self._gradients: list[tuple[torch.UntypedStorage, int]] = []
        """Those without memory, and the bytes of each."""
        self.seconds = 0.0

    def leave(self, weights: bool | None = None) -> None:
        """Gradients and the optimizer's state leave.

        Args:
            weights: whether the weights leave, too; None: if `what` says so.

        Raises:
            UserError: the host lacks memory. Nothing is lost then.
        """
        if self.what == "none":
            return
        started = time.perf_counter()
        if not self._gradients:
            self._gradients = [(storage, storage.nbytes()) for storage in storages(self._gradient_tensors())]
            for storage, _ in self._gradients:
                storage.resize_(0)
        self._state.leave()
        if self.what == "all" if weights is None else weights:
            self._weights.leave()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # another process wants it
        self.seconds += time.perf_counter() - started

    def come_back(self, only_weights: bool = False) -> None:
        """The weights come back, and unless `only_weights` the optimizer's state and room for gradients, too.

        Raises:
            UserError: the GPU lacks memory. Nothing is lost then.
        """
        if self.what == "none":
            return
        started = time.perf_counter()
        self._weights.come_back()
        if not only_weights:
            self._state.come_back()
            allocate(self._gradients)  # an update begins with zeros
            self._gradients = []
        self.seconds += time.perf_counter() - started

    def _gradient_tensors(self) -> Iterator[torch.Tensor]:
        yield from (p.main_grad for p in self._model.parameters() if hasattr(p, "main_grad"))

    def _weight_tensors(self) -> Iterator[torch.Tensor]:
        yield from self._model.parameters()

    def _state_tensors(self) -> Iterator[torch.Tensor]:
        """The optimizer's float32 weights and moments, without tensors that are on the host anyway."""
        weights = {storage._cdata for storage in storages(self._weight_tensors())}
        device = next(self._model.parameters()).device
        for part in optimizer_parts(self._optimizer):
            if part.optimizer is None:
                continue
            masters = [p for group in part.optimizer.param_groups for p in group["params"]]
            moments = [x for state in part.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
            for tensor in masters + moments:
                if tensor.device == device and tensor.untyped_storage()._cdata not in weights:
                    yield tensor


class Left(NamedTuple):
    """Bytes of one rank while the engines work.

    Attributes:
        gpu: that it has left free on its GPU.
        host: of pinned host memory that it needs for it.
    """

    gpu: int
    host: int


def left(what: What, parameters: int, gradients: int, optimizer: int) -> Left:
    """What a rank leaves free whose weights, gradients and optimizer state take so many bytes.

    optimizer: without what stays on the host anyway. In float32 the weights are the optimizer's, and count once, among
    `parameters`.
    """
    moved = {"none": 0, "state": optimizer, "all": optimizer + parameters}[what]
    return Left(moved + (gradients if what != "none" else 0), moved)
