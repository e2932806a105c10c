"""The optimizer's state in host memory, where it never fits the GPU (`training.optimizer.offload`).

A step goes through the parameters in pieces: the state of a piece comes to the GPU, is stepped there by the same
optimizer as ever, and leaves again. So the numbers are those of a step on everything at once, bit by bit, and neither
Megatron's distributed optimizer, nor transformer-engine, nor torch needs to know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from spell_megatron.training.host_copy import HostCopy
from spell_megatron.training.optimizer import optimizer_parts

PIECE_BYTES = 1 << 30
"""State that is on the GPU at the same time; more if a single parameter has more."""

_BYTES_PER_ELEMENT = 12
"""Of the state: a float32 weight and two moments."""


def keep_on_host(optimizer: MegatronOptimizer) -> None:
    """Moves the state of an optimizer to host memory, for good.

    Nothing may read the state from then on but the optimizer's own step, and what is done inside `state_on_host`.

    Raises:
        UserError: the host lacks memory.
    """
    for part in optimizer_parts(optimizer):
        if part.optimizer is not None:
            part.on_host = _StateOnHost(part)


@contextmanager
def state_on_host(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, the state that is kept on the host can be read and written there, for checkpoints.

    Without `keep_on_host` it does nothing.
    """
    with ExitStack() as stack:
        for part in optimizer_parts(optimizer):
            if hasattr(part, "on_host"):
                stack.enter_context(part.on_host.readable())
        yield


class _Piece(NamedTuple):
    """What is stepped at the same time: parameters of one of the optimizer's groups, by its number."""

    group: int
    parameters: list[torch.Tensor]
    state: HostCopy


class _StateOnHost:
    """The state of one of Megatron's optimizers, which is stepped piece by piece."""

    def __init__(self, part: Any) -> None:
        self._inner = part.optimizer
        self._step = part.optimizer.step
        self._weights = dict(_weights_of(part))
        """The model's weight, or shard of it, that each float32 weight is copied to."""
        self._pieces: list[_Piece] = []
        for number, group in enumerate(self._inner.param_groups):
            for parameters in _cut(group["params"], PIECE_BYTES):
                state = HostCopy(partial(self._state, parameters), "training.optimizer.offload")
                state.leave()
                self._pieces.append(_Piece(number, parameters, state))
        self._inner.step = self.step
        if self._weights:
            part._copy_main_params_to_model_params = lambda: None  # a step has done it

    def _state(self, parameters: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for parameter in parameters:
            if parameter in self._weights:
                yield parameter
            yield from (x for _, x in self._moments(parameter))

    def _moments(self, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The parameter's moments; a number of steps, which torch has among them, is on the host anyway."""
        state = self._inner.state.get(parameter, {})
        return [(name, x) for name, x in state.items() if torch.is_tensor(x) and x.dim()]

    @torch.no_grad()
    def step(self) -> None:
        """Steps all parameters that have a gradient, and rounds the float32 weights to those of the model."""
        groups, stepped = self._inner.param_groups, {}
        try:
            for group, parameters, state in self._pieces:
                state.come_back()
                stepped[group] = groups[group] | {"params": parameters}
                self._inner.param_groups = [stepped[group]]
                self._step()
                for parameter in parameters:
                    if parameter in self._weights:
                        self._weights[parameter].data.copy_(parameter)
                state.leave()
        finally:
            self._inner.param_groups = groups
        for group, values in stepped.items():  # transformer-engine counts the steps there
            groups[group].update({name: value for name, value in values.items() if name != "params"})

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Inside, weights and moments are tensors of the host's memory. What is put in their place is kept."""
        kept: list[tuple[torch.Tensor, str, torch.Tensor, torch.Tensor]] = []
        for _, parameters, state in self._pieces:
            for parameter in parameters:
                for name, tensor in [("", parameter.data), *self._moments(parameter)]:
                    if (on_host := state.on_host(tensor)) is not None:
                        kept.append((parameter, name, tensor, on_host))
        for parameter, name, _, on_host in kept:
            self._put(parameter, name, on_host)
        try:
            yield
        finally:
            for parameter, name, tensor, on_host in kept:
                now = self._inner.state[parameter][name] if name else parameter.data
                if now.data_ptr() != on_host.data_ptr():
                    on_host.copy_(now)
                self._put(parameter, name, tensor)

    def _put(self, parameter: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        if name:
            self._inner.state[parameter][name] = tensor
        else:
            parameter.data = tensor


def _weights_of(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each float32 weight of an optimizer, and what it is the exact value of; none where the model is in float32."""
    if isinstance(part, DistributedOptimizer):
        masters, weights = part.shard_fp32_from_float16_groups, part.shard_float16_groups
    else:
        masters, weights = getattr(part, "fp32_from_float16_groups", []), getattr(part, "float16_groups", [])
    yield from zip(chain(*masters), chain(*weights), strict=True)


def _cut(parameters: list[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """The parameters in pieces whose state takes at most so many bytes; a larger one is alone."""
    piece: list[torch.Tensor] = []
    held = 0
    for parameter in parameters:
        needed = _BYTES_PER_ELEMENT * parameter.numel()
        if piece and held + needed > size:
            yield piece
            piece, held = [], 0
        piece.append(parameter)
        held += needed
    if piece:
        yield piece
