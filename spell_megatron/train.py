"""The main job: Algorithm 1 of SPELL (arXiv 2509.23863).

Each step rolls out questions, answers and judgments with the current weights, updates the weights once on all of them,
and gives the new weights to the engines.
"""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from spell_megatron import ranks
from spell_megatron.checkpoint.restore import restore
from spell_megatron.checkpoint.saver import Saver
from spell_megatron.config.reading import as_recorded
from spell_megatron.config.schema import Config
from spell_megatron.errors import ProcessLost, UserError
from spell_megatron.hub import name_of
from spell_megatron.leader import Follower, Leader, Metrics, Rank
from spell_megatron.monitoring.in_a_row import InARow
from spell_megatron.monitoring.progress import Progress
from spell_megatron.monitoring.stopping import Reason, Stopped, StopRequest
from spell_megatron.overlap import finish
from spell_megatron.preflight.resume import finished
from spell_megatron.processes.collective import from_rank_0, lost_connection
from spell_megatron.processes.joining import join
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.engine_weights import Order
from spell_megatron.weights.huggingface import load_weights

NOT_FINITE = (
    "The gradient was not finite in {count} updates in a row (up to step {step}), so the run stops. Resume from the "
    "last good checkpoint in {folder} with a smaller training.optimizer.lr."
)

LOST = (
    "The connection to another process of the trainer is lost, which has ended or cannot be reached ({error}). What it "
    "said last, here or in its log, says why."
)
_FIRST = 10.0
"""Seconds that a process that has failed has to end before those that have lost it."""


def run(config: Config, resume: bool = False, rendezvous: Rendezvous | None = None) -> Reason | None:
    """Train a policy by self-play; every trainer process calls it.

    Args:
        config: the checked configuration.
        resume: continue from the newest checkpoint in the run's folder.
        rendezvous: where the processes of a cluster's job find each other.

    Returns:
        Why it stopped before its end (see `monitoring.stopping`), with a checkpoint if it had anything to save; None:
        it has made all steps, and the validation after the last.

    Raises:
        UserError: for faults that the user can correct; everything started here is stopped first.
        ProcessLost: another process of the trainer has ended.
    """
    with StopRequest(config.run.output_dir / config.run.name) as stop:
        try:
            return _run(config, resume, rendezvous, stop)
        except Stopped as stopped:
            return stopped.reason
        except UserError:
            reason = stop.reason()
            if stop.can_save or reason in (None, Reason.STOP):
                raise
            return reason  # the end of the job has ended the engines
        except RuntimeError as error:
            if not lost_connection(error):
                raise
            reason = stop.reason()
            if reason and (ranks.rank() > 0 or not stop.can_save):
                return reason
            stop.wait(_FIRST)  # a launcher ends all processes when one ends badly, and tells the status of that one
            raise ProcessLost(LOST.format(error=str(error).splitlines()[0])) from error


def _run(config: Config, resume: bool, rendezvous: Rendezvous | None, stop: StopRequest) -> Reason | None:
    folder, steps = config.run.output_dir / config.run.name, config.run.steps
    with ExitStack() as stack:
        stack.callback(backend.shutdown)
        if rendezvous:
            join(config.run.device, rendezvous)
        policy = PolicyModel.load(config.model.path, config.model.dtype)
        backend.initialise(policy, config.training, config.run.device, config.run.seed)
        check_same_commit(name_of(config.model.path))
        resume = from_rank_0(resume)  # a job's script decides it on each node, and may not see the checkpoint there yet
        if from_rank_0(nothing_to_do := finished(config) if resume and dist.get_rank() == 0 else ""):
            Progress(enabled=dist.get_rank() == 0).line(nothing_to_do)
            return None
        rank: Rank = Leader(config, folder, stop, rendezvous) if dist.get_rank() == 0 else Follower(config, stop)
        stack.enter_context(rank)
        with rank.progress.stage("loading the policy"):
            trainer = load_trainer(policy, config)
            step, state, rows = restore(folder, trainer) if resume else (0, {}, None)
        settings = as_recorded(config).model_dump_json(indent=2)
        saver = Saver(folder, trainer, config.checkpoint, config.model.path, settings)
        stack.enter_context(saver)
        if saver.untrained:
            rank.progress.line(f"{saver.untrained} are not trained; they go into every checkpoint as they are.")
        rank.begin(trainer, step, state, rows)

        skipped, saved, stopped = InARow(NOT_FINITE), step if resume else None, None
        while step < steps and not stopped:
            order, rows, metrics = rank.roll_out(step + 1)
            if order is Order.STOP:
                break
            step += 1
            metrics |= update(trainer, rows, rank.progress) if order is Order.UPDATE else {"train/empty": 1.0}
            skipped.note(bool(metrics.get("train/skipped")), step=step, folder=saver.root)
            stopped = from_rank_0(stop.reason())
            saver.poll()
            if step == steps or step % config.checkpoint.every == 0 or config.validation.due(step, steps):
                metrics |= save(saver, step, rank)
                saved = step
            if not stopped:
                metrics |= rank.push(step)  # the trainer's state leaves GPUs that it shares with engines
            rank.end_step(step, metrics)

        if step < steps and saved != step:
            save(saver, step, rank)
        rank.meet()
        saver.finish()
        return rank.end(step, trainer.scheduler.num_steps)


def check_same_commit(model: str) -> None:
    """Every process has the same model of the hub, of whose newest version caches may hold different ones.

    model: name and commit at the hub, or the folder of a model, which may be another one on each machine.

    Raises:
        UserError: they differ.
    """
    first = from_rank_0(model)
    if model != first and not Path(model).is_absolute():
        raise UserError(
            f"This process has the model {model} of the hub, and the first one has {first}. Name the commit: "
            f"--model.path={shlex.quote(first)}."
        )


def load_trainer(policy: PolicyModel, config: Config) -> Trainer:
    """A trainer that has made no update, with the weights of `model.path`."""
    model = build_model(policy, config.training)
    load_weights(model, config.model.path)
    return Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)


def update(trainer: Trainer, rows: list[Row] | None, progress: Progress) -> Metrics:
    """Update the weights once, on these rows, which rank 0 has, and on those that came during the rollout."""
    with progress.stage("update") as advance:
        return {f"train/{name}": value for name, value in finish(trainer, rows, advance).items()}


def save(saver: Saver, step: int, rank: Rank) -> Metrics:
    """Save a checkpoint of `step`."""
    started = time.monotonic()
    with rank.progress.stage("checkpoint"):
        saver.save(step, rank.state(step), rank.rows)
    return {"time/checkpoint": time.monotonic() - started}
