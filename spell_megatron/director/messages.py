"""What rank 0 and the process of its director tell each other, and the rows of an update on their way."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from spell_megatron.selfplay.batch import Role, Sample
from spell_megatron.training.prefix_tree import Row

SHOW_STACKS = signal.SIGUSR2
"""The signal on which the director's process writes to standard error what each of its threads is doing."""


class _Message(msgspec.Struct, tag=True):
    """One of those below."""


class Start(_Message):
    """The first message: the run's configuration as JSON values, and its folder. The answer is `Ready`."""

    config: dict[str, Any]
    folder: str


class Connect(_Message):
    """The engines' addresses, their key, and a state to go on from, if any. The answer is `Connected`."""

    urls: list[str]
    api_key: str
    state: dict[str, Any] | None


class RollOut(_Message):
    """Roll out a step and write its dump. The answer is `RolledOut` or `GivenUp`, after any number of `Progress` and,
    if rows are wanted `early`, of `Certain`."""

    step: int
    weight_version: str
    urls: list[str]
    early: bool


class Validate(_Message):
    """The answer is `Validated` or `GivenUp`, after any number of `Progress`."""

    urls: list[str]


class GetState(_Message):
    """The answer is `State`."""


class GiveUp(_Message):
    """Give up what is under way."""


class Revived(_Message):
    """The answer to `Revive`: the engines' addresses; none: they could not be revived."""

    urls: list[str]


ToDirector = Start | Connect | RollOut | Validate | GetState | GiveUp | Revived


class Ready(_Message):
    """held_out_questions: their number."""

    held_out_questions: int


class Connected(_Message):
    """Rollouts can begin."""


class Progress(_Message):
    """How much of what is under way is done."""

    done: int


class Revive(_Message):
    """No engine answers. The answer is `Revived`."""


class PackedRow(msgspec.Struct, array_like=True):
    """A row but for its arrays. prompt: number of its array of prompt tokens; weight: of each response token."""

    prompt: int
    weight: float
    routed: bool


class Certain(_Message):
    """Rows of a group that is certain to be in the batch."""

    rows: list[PackedRow]


class RolledOut(_Message):
    """A step: those of its rows that have not come yet, its metrics, and the end of the rollout by this machine's
    monotonic clock."""

    rows: list[PackedRow]
    metrics: dict[str, float]
    ended: float


class GivenUp(_Message):
    """Nothing has changed."""


class Validated(_Message):
    metrics: dict[str, float]


class State(_Message):
    state: dict[str, Any]


class Failed(_Message):
    """What the user can correct: a text, or an error of the operating system with its number and file."""

    text: str
    number: int | None = None
    file: str | None = None


class Log(_Message):
    """Something for the run's log. trace: of an error, "" without one; silent: not for the screen."""

    name: str
    level: int
    text: str
    trace: str
    silent: bool


FromDirector = Ready | Connected | Progress | Revive | Certain | RolledOut | GivenUp | Validated | State | Failed | Log


def pack_rows(
    samples: Sequence[Sample], role_weights: Mapping[Role, float]
) -> tuple[list[PackedRow], list[np.ndarray]]:
    """What the trainer learns of samples: tokens, and the weight of the response tokens. Each prompt is in it once."""
    prompts = {id(sample.prompt_ids): sample.prompt_ids for sample in samples}
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    arrays = [np.asarray(prompt, dtype=np.int32) for prompt in prompts.values()]
    rows = []
    for sample in samples:
        weight = sample.advantage * role_weights.get(sample.role, 1.0)
        rows.append(PackedRow(numbers[id(sample.prompt_ids)], weight, sample.routing is not None))
        arrays.append(np.asarray(sample.response_ids, dtype=np.int32))
        arrays.append(np.asarray(sample.logprobs, dtype=np.float32))
        if sample.routing is not None:
            arrays.append(sample.routing)
    return rows, arrays


def unpack_rows(packed: Sequence[PackedRow], arrays: Sequence[np.ndarray]) -> list[Row]:
    """The rows of `pack_rows`."""
    prompts = arrays[: 1 + max((row.prompt for row in packed), default=-1)]
    rest, rows = iter(arrays[len(prompts) :]), []
    for row in packed:
        prompt, response, logprobs = prompts[row.prompt], next(rest), next(rest)
        rows.append(
            Row(
                tokens=np.concatenate([prompt, response], dtype=np.int64),
                prompt_length=len(prompt),
                weights=np.full(len(response), row.weight, dtype=np.float32),
                rollout_logprobs=logprobs,
                routing=next(rest) if row.routed else None,
            )
        )
    return rows
