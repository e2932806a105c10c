"""What a trainer process does in a step besides the update.

Rank 0 is the `Leader`: it keeps the engines, plays the roles on them, validates, and writes what a run leaves behind.
The other ranks are `Follower`s with the same methods: they wait for its orders.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from spell_megatron.ahead import Batch, check_gpus
from spell_megatron.checkpoint.folder import note_score
from spell_megatron.config.reading import as_recorded, to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.director.remote import RemoteDirector
from spell_megatron.errors import UserError
from spell_megatron.files import write_text
from spell_megatron.monitoring.in_a_row import InARow
from spell_megatron.monitoring.metrics import MetricsLogger
from spell_megatron.monitoring.progress import Progress, gain
from spell_megatron.monitoring.status import Status
from spell_megatron.monitoring.stopping import Reason, Stopped, StopRequest
from spell_megatron.monitoring.timeline import Timeline
from spell_megatron.monitoring.versions import note_versions
from spell_megatron.overlap import EarlyRows, accumulate, when
from spell_megatron.planner.engine_share import engine_settings
from spell_megatron.plural import counted
from spell_megatron.preflight.resume import VALIDATED
from spell_megatron.processes.collective import from_rank_0
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.ranks import launched_processes, local_processes
from spell_megatron.rollout.engines import Engines
from spell_megatron.selfplay.outcomes import why_empty
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.swap import Swap
from spell_megatron.training.trainer import Trainer
from spell_megatron.training.waiting import Waiting
from spell_megatron.weights.engine_weights import EngineWeights, Order

Metrics = dict[str, float]

NOTHING_TO_TRAIN_ON = "{count} steps in a row had nothing to train on, so the run stops; the last: {why}"

NOTHING_TRAINED = "{folder}: nothing was trained in {steps}, and the weights are those of the start. {why}"


class Leader:
    """Rank 0. A context manager: it starts the engines, and leaving it ends them.

    Args:
        config: the run's configuration.
        folder: the run's.
        stop: whether the run is asked to stop.
        rendezvous: where the processes of a cluster's job find each other.
    """

    def __init__(self, config: Config, folder: Path, stop: StopRequest, rendezvous: Rendezvous | None) -> None:
        self._config, self._folder, self._stop, self._rendezvous = config, folder, stop, rendezvous
        self._stack = ExitStack()
        parallel = config.training.parallel
        self._trainers = local_processes() or parallel.processes
        self._replicas = (launched_processes() or parallel.processes) // parallel.dense_ranks
        self._empty = InARow(NOTHING_TO_TRAIN_ON)
        self._first_validation: Metrics = {}
        self._last_validation: Metrics = {}
        self._unvalidated = False
        self._ready: Batch | None = None  # of the next update, if it is written already
        self._restarts = self._without_update = 0
        self._why_none = ""

    def __enter__(self) -> Leader:
        with ExitStack() as stack:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._status = stack.enter_context(Status(self._folder, self._config.run.steps))
            self.progress = Progress(status=self._status, timeline=Timeline(self._folder))
            if not (self._folder / "config.yaml").exists():
                self._note_settings()
            note_versions(self._folder)
            # Its libraries are imported while the engines start.
            self._director = stack.enter_context(RemoteDirector(self._config, self._folder, self._stop.reason))
            with self.progress.stage("starting engines"):
                self._engines = stack.enter_context(self._open_engines())
                check_gpus(self._config.training.staleness, self._engines.transport)
                self._engines.sleep()  # the trainer's turn on GPUs that they share
            self._status.watch(self._engines.health)
            from_rank_0("the engines are ready")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _note_settings(self) -> None:
        write_text(self._folder / "config.yaml", to_yaml(as_recorded(self._config)))

    def _open_engines(self) -> Engines:
        run, training = self._config.run, self._config.training
        elsewhere = self._config.rollout.urls or (self._rendezvous and self._rendezvous.engine_nodes)
        return Engines.open(
            self._config.model,
            self._config.rollout if elsewhere else engine_settings(self._config, self._trainers),
            self._folder / "logs",
            device=run.device,
            seed=run.seed,
            routing=training.routing_replay,
            trainers=self._trainers,
            rendezvous=self._rendezvous,
        )

    def begin(self, trainer: Trainer, step: int, state: dict[str, Any], rows: list[Row] | None) -> None:
        """Connect trainer and engines, and give the engines the trainer's weights.

        Args:
            trainer: with the weights after `step` updates.
            state: what `state` returned when they were saved; {} at the start of a run. A validation of these weights
                that is due, and was not made or was interrupted, comes first.
            rows: what was in `rows` then.
        """
        if rows is not None:
            self._ready = Batch.restored(state["ready"], rows)
        self._trainer = trainer
        if why := self._no_replay(trainer):
            self.progress.line(f"Routing replay is off: {why}.")
        enter = self._stack.enter_context
        self._weights = _engine_weights(trainer, self._engines, self._config, self.progress, self._stop)
        self._stack.callback(self._weights.close)
        self._stack.callback(self._director.close)  # before the engines end
        self._director.connect(self._engines, self._weights.revive, state["selfplay"] if state else None)
        resume_step = step if state else None
        self._log = enter(
            MetricsLogger(self._folder, self._config.logging, self._config.model_dump(mode="json"), resume_step)
        )
        self._overlap, line = when(self._config.rollout, self._config.training, self._engines, self._trainers)
        self.progress.line(line)
        metrics = self.push(step)
        with self.progress.stage("comparing engines and trainer"):
            _probe(self._weights, trainer, self._config)
        self._note_settings()  # those of a resume count only now that it can train
        self._stop.can_save = True
        if not state:
            self._log.log(0, metrics)
        if not self._log.has(step, VALIDATED):
            self._first_validation = self._validate(step)
            if self._first_validation:
                self.progress.validation(step, self._first_validation)

    def _no_replay(self, trainer: Trainer) -> str:
        """Why a mixture of experts is trained without the engines' routings; "" if it is not."""
        if not trainer.model.config.num_moe_experts:
            return ""
        if not self._config.training.routing_replay:
            return "training.routing_replay is false"
        return self._engines.no_routing

    def roll_out(self, step: int) -> tuple[Order, list[Row] | None, Metrics]:
        """The rows of update `step` that are left to train on, and what is to be done with them; STOP: the rollout was
        given up.

        With its return the trainer's turn begins on GPUs that it shares with the engines; with `push` theirs does.
        """
        self._started, self._rollout_seconds = time.monotonic(), 0.0
        self._status.update(state="running", step=step)
        self.progress.begin_step(step)
        early = EarlyRows(Waiting(self._config.training, self._replicas), self._accumulate)
        batch = self._ready or self._write(step, step - 1, early)
        if batch is None:
            return self._give_up()
        # A checkpoint holds it if the step is given up after this: self-play has moved on. That does not happen where
        # rows came early, which the batch lacks: engines with GPUs of their own do not sleep.
        self._ready = batch
        following = None
        if self._config.training.staleness and step < self._config.run.steps:
            following = self._write(step + 1, step - 1, early, batch)
            if following is None:
                return self._give_up()
        try:
            self._weights.sleep()
        except UserError:
            if not self._stop.reason():
                raise
            return self._give_up()
        self._ready, rows = following, [] if following else batch.rows
        metrics = {"time/hidden": 0.0} if self._config.training.staleness else {}  # of the last: no rollout follows
        metrics |= batch.metrics
        metrics |= {"train/staleness": float(step - 1 - batch.version), "time/rollout": self._rollout_seconds}
        return self._weights.give_order(Order.SKIP if batch.empty else Order.UPDATE), rows, metrics

    def _write(self, step: int, version: int, early: EarlyRows, before: Batch | None = None) -> Batch | None:
        """Roll out the batch of `step` on the engines, whose weights have had `version` updates; None: given up.

        Meanwhile the trainer works on its `early` rows, or on all rows of the batch `before`.
        """
        started = time.monotonic()
        with self.progress.stage("rollout", self._config.selfplay.groups) as advance:
            if before is None:
                certain = early.add if self._overlap else None
                rollout = self._director.roll_out(step, str(version), advance, certain)
            else:
                work = partial(early.accumulate, before.rows) if before.rows else None
                rollout = self._director.roll_out(step, str(version), advance, None, work)
            if rollout:
                self.progress.ended(rollout.ended)  # the trainer may have worked on
        rows = early.rest()
        if rollout is None:
            return None
        rows += rollout.rows
        seconds = rollout.ended - started
        self._rollout_seconds += seconds
        speed = rollout.metrics["selfplay/generated_tokens"] / seconds
        metrics = rollout.metrics | {"rollout/tokens_per_second": speed}
        if before or self._overlap:
            (before.metrics if before else metrics)["time/hidden"] = early.hidden(rollout.ended)
        empty = not rows and (before is not None or not early)
        why = why_empty(metrics, self._folder / "rollouts") if empty else ""
        if why:
            self.progress.line(f"step {step}: {why}")
        self._empty.note(empty, why=why)
        self._why_none = why or self._why_none
        return Batch(step, version, rows, metrics, empty)

    def _accumulate(self, rows: list[Row]) -> None:
        with self.progress.span("accumulate"):
            self._weights.give_order(Order.ACCUMULATE)
            accumulate(self._trainer, rows)

    def _give_up(self) -> tuple[Order, None, Metrics]:
        self._trainer.drop()
        with suppress(UserError):  # the end of the job has ended the engines
            self._engines.sleep()
        return self._weights.give_order(Order.STOP), None, {}

    def push(self, step: int) -> Metrics:
        """Give the engines the weights after update `step`."""
        self._engines.new_step()
        try:
            with self.progress.stage("push"):
                return self._weights.push(step)
        except UserError:
            if reason := self._stop.reason():  # the end of the job has ended the engines
                raise Stopped(reason) from None
            raise

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` holds besides the trainer and `rows`."""
        ready = {"ready": self._ready.record()} if self._ready else {}
        return {"step": step, "selfplay": self._director.state_dict(), **ready}

    @property
    def rows(self) -> list[Row] | None:
        """Those of the next update, if they are written already."""
        return self._ready.rows if self._ready else None

    def end_step(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of update `step`, and validate where it is due."""
        metrics["time/step"] = time.monotonic() - self._started
        metrics["rollout/restarts"] = self._weights.restarts - self._restarts
        self._restarts = self._weights.restarts
        self._without_update += bool(metrics.get("train/skipped") or metrics.get("train/empty"))
        if metrics.get("train/skipped"):
            self._why_none = "The gradient was not finite: lower training.optimizer.lr."
        self._log.log(step, metrics)
        self._last_validation = self._validate(step)
        self.progress.summary(step, self._config.run.steps, metrics | self._last_validation)

    def _validate(self, step: int) -> Metrics:
        """Accuracy on the held-out questions, at the steps where the configuration asks for it.

        {} if it is not due, or if it is given up because the run is asked to stop.
        """
        if not self._config.validation.due(step, self._config.run.steps):
            return {}
        started = time.monotonic()
        with self.progress.stage("validation", self._director.held_out_questions) as advance:
            # The engines of a run that is to stop do not get the last weights, and end with the job.
            metrics = {} if self._stop.reason() else self._director.validate(advance)
        self._unvalidated = not metrics
        if metrics:
            self._log.log(step, metrics | {"time/validation": time.monotonic() - started})
            if step:
                note_score(self._folder, step, metrics[VALIDATED])
        return metrics

    def meet(self) -> None:
        """Wait until all ranks have come here: rank 0 last, after the last validation."""
        self._weights.give_order(Order.END)

    def end(self, step: int, updates: int) -> Reason | None:
        """Tell the user that the run ends after `step` steps; returns why it stopped before its end, if it did.

        Raises:
            UserError: the run has made all steps, and none of them has changed the weights (`updates` is 0).
        """
        steps, stopped = self._config.run.steps, None
        if 0 < steps <= step and not updates:
            from_rank_0(None)
            raise UserError(
                NOTHING_TRAINED.format(folder=self._folder, steps=counted(steps, "step"), why=self._why_none)
            )
        if step < steps or self._unvalidated:
            stopped = self._stop.reason() or Reason.STOP
            missing = " before its validation" if self._unvalidated else ""
            line = f"stopped after step {step} of {steps}{missing} ({stopped}); go on with --resume"
        else:
            left_out = f", {self._without_update} of them without an update" if self._without_update else ""
            line = f"done after {counted(steps, 'step')}{left_out}{gain(self._first_validation, self._last_validation)}"
        self.progress.line(f"{self._folder}: {line}")
        self._status.update(state="stopped" if stopped else "finished")
        return from_rank_0(stopped)


class Follower:
    """Any other rank, with the methods of `Leader`: it follows the orders of rank 0."""

    def __init__(self, config: Config, stop: StopRequest) -> None:
        self._config, self._stop = config, stop
        self._stack = ExitStack()
        self.progress = Progress(enabled=False)

    def __enter__(self) -> Follower:
        # Engines on the same GPUs measure the free memory before any rank takes some.
        from_rank_0("the engines are ready")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def begin(self, trainer: Trainer, step: int, state: dict[str, Any], rows: list[Row] | None) -> None:
        self._trainer = trainer
        self._weights = _engine_weights(trainer, None, self._config, self.progress, self._stop)
        self._stack.callback(self._weights.close)
        self.push(step)
        _probe(self._weights, trainer, self._config)
        self._stop.can_save = True

    def roll_out(self, step: int) -> tuple[Order, None, Metrics]:
        while (order := self._weights.wait_for_order()) is Order.ACCUMULATE:
            accumulate(self._trainer, None)
        if order is Order.STOP:
            self._trainer.drop()
        return order, None, {}

    def push(self, step: int) -> Metrics:
        return self._weights.push(step)

    def state(self, step: int) -> dict[str, Any]:
        return {}

    rows = None

    def end_step(self, step: int, metrics: Metrics) -> None:
        pass

    def meet(self) -> None:
        self._weights.wait_for_order()

    def end(self, step: int, updates: int) -> Reason | None:
        return from_rank_0(None)


Rank = Leader | Follower


def _engine_weights(
    trainer: Trainer, engines: Engines | None, config: Config, progress: Progress, stop: StopRequest
) -> EngineWeights:
    colocated = from_rank_0(bool(engines and engines.transport.colocated))
    what = config.training.swap
    if what == "auto":
        what = "all" if colocated else "none"
    return EngineWeights(
        trainer.model,
        engines,
        Swap(trainer.model, trainer.optimizer, what),
        verify=config.rollout.verify_weights,
        say=progress.line,
        stop=stop.reason,
    )


def _probe(weights: EngineWeights, trainer: Trainer, config: Config) -> None:
    """UserError if the engines do not compute what the trainer does."""
    # Forward only, a row twice as long as a microbatch takes less memory than forward and backward of a microbatch.
    longest = min(config.rollout.sampling.max_prompt_tokens, 2 * config.training.tokens_per_microbatch)
    weights.probe(trainer.mismatch, config.rollout, longest)
