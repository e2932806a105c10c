"""Rank 0's end of the director, which lives in a process of its own (`director.process`)."""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spell_megatron.config.schema import Config
from spell_megatron.director import messages
from spell_megatron.errors import ProcessLost, UserError
from spell_megatron.monitoring.run_log import log_file
from spell_megatron.processes.channel import Channel
from spell_megatron.rollout.engines import Engines
from spell_megatron.training.prefix_tree import Row

Answer = TypeVar("Answer", bound=messages.FromDirector)

_STOP_SECONDS = 0.5
_END_SECONDS = 3.0
"""How long the process may take to end by itself."""
_SHOW_SECONDS = 1.0
_GIVE_UP_SECONDS = 300.0
"""How long it may take to give up what is under way: the writing of a dump goes on, code that never returns too."""


@dataclass
class Rollout:
    """A step's rows for the trainer, but for those that came early, its metrics, and when the rollout ended, by
    `time.monotonic`."""

    rows: list[Row]
    metrics: dict[str, float]
    ended: float


class RemoteDirector:
    """Self-play and validation in a process beside this one, which is started at once and ends with it.

    Args:
        folder: the run's; the dumps of the rollouts go there.
        stop: asked now and then; anything but None: what is under way is given up.
    """

    def __init__(self, config: Config, folder: Path, stop: Callable[[], object | None] = lambda: None) -> None:
        self._stop, self._log = stop, log_file(folder, rank=0)
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "spell_megatron.director.process"),
                    *(str(theirs.fileno()), config.logging.level),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},  # "PyTorch was not found"
            )
        self._channel: Channel[messages.FromDirector] = Channel(ours, messages.FromDirector)
        self._socket = ours
        self._on_progress: Callable[[int], None] = lambda done: None
        self._inbox: queue.SimpleQueue[tuple[messages.FromDirector, list[np.ndarray]] | Exception] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._receive, name="director", daemon=True)
        self._reader.start()
        self._send(messages.Start(config.model_dump(mode="json"), str(folder)))

    def close(self) -> None:
        """End the process. May be called again."""
        self._channel.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self._socket.close()

    def __enter__(self) -> RemoteDirector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, engines: Engines, revive: Callable[[], list[str]], state: dict[str, Any] | None) -> None:
        """Before anything else: the engines, and where to go on.

        Args:
            revive: called in this thread, in a rollout or a validation, when no engine answers. It restarts them, and
                returns their addresses once they have the same weights.
            state: what `state_dict` returned; None: the beginning.

        Raises:
            UserError: documents, prompts, tokenizer, held-out questions or the state cannot be used.
        """
        self._engines, self._revive = engines, revive
        self.held_out_questions = self._answer(messages.Ready).held_out_questions
        self._send(messages.Connect(engines.urls, engines.api_key, state))
        self._answer(messages.Connected)

    def roll_out(
        self,
        step: int,
        weight_version: str,
        on_progress: Callable[[int], None],
        on_certain: Callable[[list[Row]], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Rollout | None:
        """One step of self-play on the engines, and its dump; None: given up, and nothing has changed.

        Args:
            on_progress: gets the number of mixed groups, in another thread: this one may be in an update.
            on_certain: gets rows that are certain to be in the batch, all that have come since it was called last.
                Meanwhile the rollout goes on.
            meanwhile: called once, while the rollout goes on, unless it is given up before.
        """
        certain: list[Row] = []
        work = [meanwhile] if meanwhile else []

        def when_idle() -> None:
            if work:
                work.pop()()
            if certain and on_certain:
                on_certain(certain.copy())
                certain.clear()

        task = messages.RollOut(step, weight_version, self._engines.urls, on_certain is not None)
        done = self._work(task, on_progress, certain.extend, when_idle)
        if done is None:
            return None
        if work:  # no message was waited for
            work.pop()()
        rolled_out, arrays = done
        assert isinstance(rolled_out, messages.RolledOut)
        rows = certain + messages.unpack_rows(rolled_out.rows, arrays)
        return Rollout(rows, rolled_out.metrics, rolled_out.ended)

    def validate(self, on_progress: Callable[[int], None]) -> dict[str, float]:
        """Accuracy of the engines' weights on the held-out questions; {} when there are none, or it was given up."""
        if not self.held_out_questions:
            return {}
        done = self._work(messages.Validate(self._engines.urls), on_progress)
        if done is None:
            return {}
        assert isinstance(done[0], messages.Validated)
        return done[0].metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for identical next batches (JSON)."""
        self._send(messages.GetState())
        return self._answer(messages.State).state

    def _work(
        self,
        task: messages.ToDirector,
        on_progress: Callable[[int], None],
        on_certain: Callable[[list[Row]], None] = lambda rows: None,
        when_idle: Callable[[], None] = lambda: None,
    ) -> tuple[messages.FromDirector, list[np.ndarray]] | None:
        """The answer to a task on the engines; None: given up. `when_idle` is called when no message waits."""
        self._on_progress = on_progress
        self._send(task)
        given_up, looked, fault = False, 0.0, None
        while True:
            if not given_up and time.monotonic() - looked > _STOP_SECONDS:
                looked = time.monotonic()
                if self._stop():
                    self._send(messages.GiveUp())
                    given_up = True
            if given_up and time.monotonic() - looked > _GIVE_UP_SECONDS:
                raise self._stuck()
            if not given_up and self._inbox.empty():
                when_idle()
            answer = self._next(_STOP_SECONDS)
            if answer is None:
                continue
            match answer[0]:
                case messages.Certain(rows):
                    on_certain(messages.unpack_rows(rows, answer[1]))
                case messages.Revive():
                    fault = self._answer_revive(given_up)
                case messages.GivenUp():
                    return None
                case messages.Failed() as failed:
                    error = fault or _error(failed)
                    if isinstance(error, UserError):
                        if self._stop():  # the end of a job ends the engines too
                            return None
                        self._engines.check()  # if a server that was started here died, its last words say more
                    raise error
                case _:
                    return answer

    def _answer_revive(self, given_up: bool) -> UserError | None:
        """Revive the engines for the director; why it was not possible."""
        try:
            self._send(messages.Revived([] if given_up else list(self._revive())))
        except UserError as error:
            self._send(messages.Revived([]))
            return error
        return None

    def _answer(self, kind: type[Answer]) -> Answer:
        """The answer to what has been sent; its error, if it has failed."""
        got = self._next(None)
        assert got is not None, "without a limit there is an answer"
        if isinstance(got[0], messages.Failed):
            raise _error(got[0])
        assert isinstance(got[0], kind)
        return got[0]

    def _next(self, seconds: float | None) -> tuple[messages.FromDirector, list[np.ndarray]] | None:
        """The next message; None: there was none in that time."""
        try:
            got = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(got, EOFError):
            raise self._lost() from None
        if isinstance(got, Exception):
            raise got
        return got

    def _send(self, message: messages.ToDirector) -> None:
        try:
            self._channel.send(message)
        except ConnectionError:
            raise self._lost() from None

    def _receive(self) -> None:
        """Receive all the time: the process never waits for this one, whose main thread may be in an update."""
        try:
            while True:
                message, arrays = self._channel.receive()
                if isinstance(message, messages.Log):
                    _log(message)
                elif isinstance(message, messages.Progress):
                    self._on_progress(message.done)
                else:
                    self._inbox.put((message, arrays))
        except Exception as error:  # the main thread waits for it
            self._inbox.put(error)

    def _stuck(self) -> ProcessLost:
        """End the process, which first writes to standard error what it is doing."""
        self.process.send_signal(messages.SHOW_STACKS)
        time.sleep(_SHOW_SECONDS)
        self.process.kill()
        return ProcessLost(
            f"The run's process for self-play ({self.process.pid}) was asked to stop, and was ended because it had not "
            f"in {_GIVE_UP_SECONDS:g} s. What it was doing is above; a function of your own must return for every "
            "input. Resume the run from its last checkpoint."
        )

    def _lost(self) -> ProcessLost:
        status = self.process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ProcessLost(
            f"The run's process for self-play ({self.process.pid}) {how}. What it said last is above, or in "
            f"{self._log}. If the system has killed it, memory was short. Resume the run from its last checkpoint."
        )


def _log(said: messages.Log) -> None:
    """Log what the process has logged, with its stack trace, which is for the file."""
    logger, extra = logging.getLogger(said.name), {"silent": said.silent}
    record = logger.makeRecord(said.name, said.level, "", 0, said.text, (), None, extra=extra)
    record.exc_text = said.trace or None
    logger.handle(record)


def _error(failed: messages.Failed) -> UserError | OSError:
    return UserError(failed.text) if failed.number is None else OSError(failed.number, failed.text, failed.file)
