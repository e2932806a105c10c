"""The process of a run's director, beside rank 0: JSON, prompts and judgments do not keep the trainer waiting there.

    python -m spell_megatron.director.process FD LEVEL

FD is the number of an open socket to rank 0 (see `director.remote`), LEVEL the setting logging.level. The process ends
with rank 0. It does without torch, which transformers would import for a tokenizer.
"""

from __future__ import annotations

import faulthandler
import logging
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np

from spell_megatron.config.schema import Config
from spell_megatron.director import messages
from spell_megatron.director.director import Director
from spell_megatron.encodings import printable
from spell_megatron.errors import UserError, explain
from spell_megatron.monitoring.dumps import write_dump
from spell_megatron.monitoring.run_log import SILENT, Level, logged_by
from spell_megatron.processes.channel import Channel
from spell_megatron.processes.lifetime import end_with_parent
from spell_megatron.processes.signals import REQUESTS
from spell_megatron.selfplay.batch import Sample

logger = logging.getLogger(__name__)

_TRACES = logging.Formatter()


class _ToRank0(logging.Handler):
    """Has rank 0 log what is logged here."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # rank 0 is gone
            trace = _TRACES.formatException(record.exc_info) if record.exc_info else ""
            silent = getattr(record, "silent", False)
            text, trace = printable(record.getMessage()), printable(trace)
            self._channel.send(messages.Log(record.name, record.levelno, text, trace, silent))


class Service:
    """Does what rank 0 asks for, one thing after the other."""

    def __init__(self, channel: Channel[messages.ToDirector]) -> None:
        self._channel = channel
        self._tasks: queue.SimpleQueue[messages.ToDirector | None] = queue.SimpleQueue()
        self._revived: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._stack = ExitStack()

    def run(self) -> None:
        """Returns when rank 0 closes the channel."""
        threading.Thread(target=self._listen, daemon=True).start()
        with self._stack:
            while task := self._tasks.get():
                try:
                    self._channel.send(*self._done(task))
                except UserError as error:
                    self._channel.send(messages.Failed(str(error)))
                except OSError as error:
                    if explain(error) is None:
                        raise
                    self._channel.send(messages.Failed(error.strerror or "", error.errno, error.filename))

    def _listen(self) -> None:
        """Receive, also while something is under way, until rank 0 is gone or what it sends cannot be read."""
        try:
            with suppress(EOFError):
                while True:
                    message, _ = self._channel.receive()
                    if isinstance(message, messages.Revived):
                        self._revived.put(message.urls)
                    elif isinstance(message, messages.GiveUp):
                        self._given_up.set()
                    else:
                        self._given_up.clear()  # rank 0 has no new task before the end of the last one
                        self._tasks.put(message)
        finally:
            self._given_up.set()
            self._revived.put([])
            self._tasks.put(None)

    def _done(self, task: messages.ToDirector) -> tuple[messages.FromDirector, list[np.ndarray]]:
        """The answer to a task, with its arrays."""
        match task:
            case messages.Start():
                self._config, self._dumps = Config.model_validate(task.config), Path(task.folder) / "rollouts"
                self._director = Director(self._config, self._given_up.is_set)
                return messages.Ready(self._director.held_out_questions), []
            case messages.Connect():
                self._director.connect(task.urls, task.api_key, self._revive)
                self._stack.callback(self._director.close)
                if task.state is not None:
                    self._director.selfplay.load_state_dict(task.state)
                return messages.Connected(), []
            case messages.RollOut():
                return self._rolled_out(task)
            case messages.Validate():
                metrics = self._director.validate(task.urls, self._progress)
                return messages.GivenUp() if metrics is None else messages.Validated(metrics), []
            case messages.GetState():
                return messages.State(self._director.selfplay.state_dict()), []
        raise ValueError(f"{task} is no task")

    def _rolled_out(self, task: messages.RollOut) -> tuple[messages.FromDirector, list[np.ndarray]]:
        weights = self._config.training.role_weights

        def send_certain(samples: list[Sample]) -> None:
            rows, arrays = messages.pack_rows(samples, weights)
            self._channel.send(messages.Certain(rows), arrays)
            for sample in samples:
                sample.routing = None  # it is large

        rollout = self._director.roll_out(
            task.step,
            task.weight_version,
            task.urls,
            lambda mixed, _: self._progress(mixed),
            send_certain if task.early else None,
        )
        ended = time.monotonic()
        if rollout is None:
            return messages.GivenUp(), []
        write_dump(rollout.samples, self._dumps, task.step, self._config.logging.dump)
        rows, arrays = messages.pack_rows(rollout.late, weights)
        return messages.RolledOut(rows, rollout.metrics, ended), arrays

    def _progress(self, done: int) -> None:
        self._channel.send(messages.Progress(done))

    def _revive(self) -> list[str]:
        self._channel.send(messages.Revive())
        if urls := self._revived.get():
            return urls
        raise UserError("The engines were not revived.")


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)  # rank 0 answers requests to stop
    faulthandler.enable()  # stack traces where a library crashes
    faulthandler.register(messages.SHOW_STACKS)
    end_with_parent()
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # transformers then takes it for not installed
    import transformers  # noqa: F401  (it sets up its loggers)

    channel: Channel[messages.ToDirector] = Channel(socket.socket(fileno=int(sys.argv[1])), messages.ToDirector)
    with logged_by(_ToRank0(channel), cast(Level, sys.argv[2])):
        try:
            Service(channel).run()
        except ConnectionError:  # rank 0 is gone
            return
        except Exception:
            logger.exception("self-play failed", extra=SILENT)
            raise


if __name__ == "__main__":
    main()
