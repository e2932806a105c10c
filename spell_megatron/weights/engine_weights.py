"""The trainer's weights on the engines, pushed again whenever engines had to be restarted.

Engines and trainer that share GPUs take turns: what the other one needs leaves (`Swap`, vLLM's sleep mode).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Literal

import torch

from spell_megatron.config.schema import RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_all, from_rank_0
from spell_megatron.rollout.engines import Engines
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.swap import Swap
from spell_megatron.weights.probe import Answers, ask, judge
from spell_megatron.weights.push import OtherModel, Push, WeightPusher
from spell_megatron.weights.reshard import Export


class Order(Enum):
    """What rank 0 tells the other ranks to do next."""

    ACCUMULATE = auto()
    """Forward and backward on rows that are certain to be in the batch, and wait for the next order."""
    UPDATE = auto()
    """Train on the batch, or on what is left of it, then push."""
    SKIP = auto()
    """Push without an update: the step has nothing to train on."""
    STOP = auto()
    """End the run before its last step."""
    END = auto()
    """End the run: all steps are done."""
    PUSH = auto()
    """Push the same weights again, to engines that were restarted, and wait for the next order."""


class EngineWeights:
    """Keeps the engines at the trainer's weights, and restarts engines that fail.

    All trainer ranks call `push`. While the others are in `wait_for_order`, rank 0 may `revive` engines.

    `push` begins the engines' turn on GPUs that trainer and engines share: the trainer's gradients and optimizer state
    leave, the engines' room for weights returns, the push fills it, the trainer's weights leave, and the KV cache
    returns. `sleep`, and then an order, begin the trainer's turn: the engines free both, and all that has left comes
    back.

    Args:
        model: the policy on this rank.
        engines: the engines on rank 0, None on the others.
        swap: moves what this rank holds on its GPU.
        verify: compare a checksum of each tensor on both sides of a push.
        say: prints a line for the user.
        stop: why the run is asked to stop, or None. Once it is, a push that fails is not repeated, because the end of
            a job ends the engines too.
    """

    def __init__(
        self,
        model: TreeGPTModel,
        engines: Engines | None,
        swap: Swap,
        *,
        verify: bool,
        say: Callable[[str], None],
        stop: Callable[[], object | None],
    ) -> None:
        self._model, self._engines, self._swap = model, engines, swap
        self._verify, self._say, self._stop = verify, say, stop
        self._export = Export(model, fuse_experts=True)
        self._pusher = WeightPusher(engines)
        self._step = 0
        self._started_again = False  # engines, since the pusher has connected to them
        self.restarts = 0
        """How often engines were restarted, on rank 0."""

    def close(self) -> None:
        """Ends the connection; the engines keep serving what they have."""
        self._pusher.close()

    def push(self, step: int) -> dict[str, float]:
        """Sends the weights to the engines, which serve version `step` from then on.

        Engines that have ended or hang are restarted first. If a push fails, all engines are restarted and the push is
        repeated, so that no engine ever serves a mixture of weights.

        Returns:
            Metrics of the push on rank 0, {} on the others.

        Raises:
            UserError: engines failed too often; their model has other parameters than the trainer's; or they were not
                started by this run and did not take the weights.
        """
        self._step = step
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # engines may share this GPU
        self._swap.leave(weights=False)
        broken = self._engines.failed() if self._engines else ()
        self._restart(() if self._stop() else broken)  # the end of a job ends the engines too
        while True:
            done, fault = self._try_push()
            if not from_rank_0(fault and not self._stop()):
                break
            self._restart(range(len(self._engines.engines)) if self._engines else (), fault)
        seconds, self._swap.seconds = self._swap.seconds, 0.0
        if self._engines is None or done is None:
            return {}
        times = {"time/push": done.seconds} | ({"time/swap": seconds} if seconds else {})
        return times | {"push/bytes": done.bytes, "push/verified": done.verified}

    def _try_push(self) -> tuple[Push | None, str]:
        """Pushes once; returns what was sent (None: nothing, or not by this rank) and what went wrong ("": nothing)."""
        self._swap.come_back(only_weights=True)
        if fault := self._wake("weights"):
            return None, fault
        stream, done = self._export.stream(self._pusher.fit_buckets(), self._pusher.everywhere), None
        try:
            done = self._pusher.push(stream, str(self._step), verify=self._verify)
        except OtherModel:
            raise
        except UserError as error:
            if not self._may_fail():
                raise
            fault = str(error)
        if fault := from_rank_0(fault):
            return None, fault
        self._swap.leave()
        return done, self._wake("kv_cache")

    def _wake(self, part: Literal["weights", "kv_cache"]) -> str:
        """Has engines that share GPUs with the trainer take memory, once all ranks have freed theirs.

        Returns:
            What went wrong, on all ranks; "": nothing.
        """
        from_all(None)
        fault = ""
        try:
            if self._engines:
                self._engines.wake(part)
        except UserError as error:
            if not self._may_fail():
                raise
            fault = str(error)
        return from_rank_0(fault)

    def _may_fail(self) -> bool:
        """Whether a fault of the engines, on rank 0, can be made good, or does not matter any more."""
        return bool((self._engines and self._engines.restartable) or self._stop())

    def sleep(self) -> None:
        """Has engines that share GPUs with the trainer free them. Called on rank 0.

        Those that cannot are started again: the trainer's memory is free for them.

        Raises:
            UserError: they cannot be started again, or the run is to stop.
        """
        assert self._engines is not None, "rank 0 has the engines"
        while True:
            try:
                return self._engines.sleep()
            except UserError as error:
                if self._stop() or not self._engines.restartable:
                    raise
                self._start_again(self._engines.failed() or range(len(self._engines.engines)), str(error))
                self._started_again = True

    def probe(
        self, mismatch: Callable[[Sequence[Row] | None], list[float]], rollout: RolloutConfig, longest: int
    ) -> None:
        """Compares the engines, which have the trainer's weights, with the trainer. All ranks call it after a `push`.

        Args:
            mismatch: `Trainer.mismatch`.
            rollout: the settings of that name.
            longest: tokens of the longest prompt to compare.

        Raises:
            UserError: they do not compute the same, or an engine does not answer.
        """
        answers: list[Answers] = []
        while from_rank_0(self._died_while_asked(answers, rollout, longest)):
            self.push(self._step)
        if self._engines:
            self.sleep()
        from_rank_0(None)  # the engines sleep
        self._swap.come_back(only_weights=True)
        rows = [row for answer in answers for row in answer.rows]
        differences = iter(mismatch(rows if self._engines else None))
        for answer in answers:
            judge(
                answer, [next(differences) for _ in answer.rows], str(self._model.policy.dtype).removeprefix("torch.")
            )
        if from_rank_0(bool(self._engines and self._engines.transport.colocated)):  # the engines have slept
            self.push(self._step)
        else:
            self._swap.leave()

    def _died_while_asked(self, answers: list[Answers], rollout: RolloutConfig, longest: int) -> bool:
        """Whether an engine, which a push can replace, ended before all answered; otherwise `answers` has these."""
        try:
            answers += ask(self._engines, self._model.policy.arch.vocabulary, rollout, longest) if self._engines else []
        except UserError:
            if self._engines is None or not (self._engines.restartable and self._engines.failed()):
                raise
            return True
        return False

    def revive(self) -> list[str]:
        """Restarts the engines, none of which answers, and gives them the weights they had. Called on rank 0.

        Returns:
            The engines' addresses, which are new.
        """
        assert self._engines is not None, "rank 0 has the engines"
        from_rank_0(Order.PUSH)
        self._restart(self._engines.failed(), "none answers")
        self.push(self._step)
        return self._engines.urls

    def give_order(self, order: Order) -> Order:
        """Tells the other ranks, which wait in `wait_for_order`, what to do next. Called on rank 0."""
        return self._obey(from_rank_0(order))

    def wait_for_order(self) -> Order:
        """Waits for rank 0's order, and pushes whenever rank 0 revives engines. Called on the other ranks."""
        while (order := from_rank_0(Order.STOP)) is Order.PUSH:
            self._restart(())
            self.push(self._step)
        return self._obey(order)

    def _obey(self, order: Order) -> Order:
        """Begins the trainer's turn, unless the run is at its end, or engines and trainer work at the same time."""
        if order not in (Order.END, Order.ACCUMULATE):
            self._swap.come_back()
        return order

    def _restart(self, broken: Sequence[int], why: str = "") -> None:
        """Restarts these engines, which rank 0 names, and then connects to all of them again.

        Without broken engines and a reason nothing happens. With a reason alone the engines are only connected again.
        """
        if not from_rank_0(bool(broken or why or self._started_again)):
            return
        self._swap.leave(weights=True)  # an engine that starts measures what is free, and takes most of the GPU
        from_all(None)
        lost = False
        if self._engines and (broken or why):
            try:
                self._start_again(broken, why)
                self.sleep()
            except UserError:
                if not self._stop():
                    raise
                lost = True  # the end of the job has ended them
        self._started_again = False
        if not from_rank_0(lost):
            self._pusher.close()
            self._pusher = WeightPusher(self._engines)

    def _start_again(self, broken: Sequence[int], why: str) -> None:
        assert self._engines is not None, "rank 0 has the engines"
        urls = ", ".join(self._engines.urls[number] for number in broken)
        self._say(f"Waiting for engines to be started again ({urls}): {why or 'ended'}.")
        self._engines.restart(broken)
        self.restarts += 1
