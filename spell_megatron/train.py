"""The main job: roll out, update, push the weights, save; Algorithm 1 of the paper (arXiv 2509.23863)."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch.distributed as dist

from spell_megatron import checkpoint
from spell_megatron.config.reading import to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.leader import Director
from spell_megatron.monitoring.dumps import write_dump
from spell_megatron.monitoring.metrics import MetricsLogger
from spell_megatron.monitoring.progress import Progress, gain
from spell_megatron.monitoring.status import Reason, Status, StopRequest
from spell_megatron.processes import joining as processes
from spell_megatron.processes.collective import from_rank_0
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.rollout.engines import Engines
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.outcomes import why_empty
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.engine_weights import EngineWeights, Order
from spell_megatron.weights.huggingface import load_weights

# A gradient that is not finite skips its update, and so does a step without a mixed group; this many of
# either in a row end the run.
MAX_SKIPPED_IN_A_ROW = 5


def run(config: Config, resume: bool = False, rendezvous: Rendezvous | None = None) -> Reason | None:
    """Train a policy by self-play; every trainer process calls it.

    Args:
        config: the checked configuration.
        resume: go on from the newest checkpoint of the run's folder.
        rendezvous: where the processes of a cluster's job find each other.

    Returns:
        Why it stopped before its last step, with a checkpoint (see `monitoring.status`); None: it has made all steps.

    Raises:
        UserError: for faults that the user can mend; everything started here is stopped first.
    """
    folder, steps = config.run.output_dir / config.run.name, config.run.steps
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(folder))
        stack.callback(backend.shutdown)
        if rendezvous:
            processes.join(config, rendezvous)
        policy = PolicyModel.load(config.model.path, config.model.dtype)
        backend.initialise(policy, config.training, config.run.device, config.run.seed)
        first = dist.get_rank() == 0
        folder.mkdir(parents=True, exist_ok=True)
        status = stack.enter_context(Status(folder, steps)) if first else None
        progress = Progress(enabled=first, status=status)
        engines = None
        if first:
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            with progress.stage("starting engines"):
                engines = stack.enter_context(Engines.open(config, folder / "logs", rendezvous))
            status.watch(engines.health)
        with progress.stage("loading the policy"):
            trainer = _make_trainer(policy, config)
            step, state = _restore(folder, trainer) if resume else (0, {})
        if first and (why := _no_replay(config, trainer, engines)):
            progress.line(f"Routing replay is off: {why}.")
        weights = EngineWeights(
            trainer.model,
            engines,
            verify=config.rollout.verify_weights,
            say=progress.line,
            stop=stop.reason,
        )
        stack.callback(weights.close)
        director = stack.enter_context(Director(config, engines, weights.revive, stop.reason)) if first else None
        resume_step = step if resume else None
        log = stack.enter_context(MetricsLogger(folder, config, resume_step=resume_step)) if first else None
        saver = stack.enter_context(_saver(folder, trainer, config))
        if director and resume:
            director.selfplay.load_state_dict(state["selfplay"])

        stop.can_save = True
        with progress.stage("push"):
            metrics = weights.push(step)
        if director and not resume:
            metrics |= _validate(director, 0, progress)
            log.log(0, metrics)
            if director.held_out_questions:
                progress.validation(0, metrics)
        before, skipped, empty, saved = metrics, 0, 0, step if resume else None
        stopped = None
        while step < steps and not stopped:
            rows, metrics, started, order = None, {}, time.monotonic(), Order.STOP
            if director:
                status.update(state="running", step=step + 1)
                with progress.stage("rollout", config.selfplay.groups) as advance:
                    rollout = director.roll_out(step + 1, str(step), lambda mixed, _: advance(mixed))
                if rollout:
                    seconds = time.monotonic() - started
                    speed = rollout.metrics["selfplay/generated_tokens"] / seconds
                    metrics = rollout.metrics | {"time/rollout": seconds, "rollout/tokens_per_second": speed}
                    rows = [_row(sample, config) for sample in rollout.batch]
                    write_dump(rollout.samples, folder / "rollouts", step + 1, config.logging.dump)
                    order = Order.UPDATE if rows else Order.SKIP
                    del rollout  # the routings of its samples are large
                    empty = 0 if rows else empty + 1
                    if empty:
                        why = why_empty(metrics, folder / "rollouts")
                        progress.line(f"step {step + 1}: {why}")
                        if empty >= MAX_SKIPPED_IN_A_ROW:
                            raise UserError(
                                f"{empty} steps in a row had nothing to train on, so the run stops; the last: {why}"
                            )
            if engines and order is not Order.STOP:
                engines.sleep()
            order = weights.wait_for_order(order)
            if order is Order.STOP:  # the rollout was given up
                stopped = from_rank_0(stop.reason())
                break
            step += 1
            if order is Order.UPDATE:
                metrics |= _update(trainer, rows, progress)
            else:
                metrics["train/empty"] = 1.0
            skipped = skipped + 1 if metrics.get("train/skipped") else 0
            if skipped >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"The gradient was not finite in {skipped} updates in a row (up to step {step}), so the run "
                    f"stops. Resume from the last good checkpoint in {folder / 'checkpoints'} with a smaller "
                    "training.optimizer.lr."
                )
            if engines:
                engines.new_step()
            stopped = from_rank_0(stop.reason())
            if not stopped:
                with progress.stage("push"):
                    metrics |= weights.push(step)
            saver.poll()
            if step == steps or step % config.checkpoint.every == 0 or config.validation.due(step, steps):
                metrics["time/checkpoint"], saved = _save(saver, step, director, progress), step
            if director:
                metrics["time/step"] = time.monotonic() - started
                metrics |= _validate(director, step, progress)
                if "validation/pass@1" in metrics:
                    checkpoint.note_score(folder, step, metrics["validation/pass@1"])
                log.log(step, metrics)
                progress.summary(step, steps, metrics)
        if step < steps and saved != step:
            _save(saver, step, director, progress)
        weights.wait_for_order(Order.END)  # until the last validation has ended
        saver.finish()
        if step < steps:
            progress.line(f"{folder}: stopped after step {step} of {steps} ({stopped}); go on with --resume")
        else:
            progress.line(f"{folder}: done after {steps} steps{gain(before, metrics)}")
        if status:
            status.update(state="finished" if step == steps else "stopped")
        return stopped if step < steps else None


def _save(saver: checkpoint.Saver, step: int, director: Director | None, progress: Progress) -> float:
    """Save a checkpoint; seconds that it took."""
    started = time.monotonic()
    with progress.stage("checkpoint"):
        saver.save(step, {"step": step, "selfplay": director.selfplay.state_dict()} if director else {})
    return time.monotonic() - started


def _make_trainer(policy: PolicyModel, config: Config) -> Trainer:
    model = build_model(policy, config.training)
    load_weights(model, config.model.path)
    return Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)


def _saver(folder: Path, trainer: Trainer, config: Config) -> checkpoint.Saver:
    return checkpoint.Saver(folder, trainer, config.checkpoint, config.model.path, config.model_dump_json(indent=2))


def _no_replay(config: Config, trainer: Trainer, engines: Engines) -> str:
    """Why a mixture of experts is trained without the engines' routings; "" if it is not."""
    if not trainer.model.config.num_moe_experts:
        return ""
    return engines.no_routing if config.training.routing_replay else "training.routing_replay is false"


def _restore(folder: Path, trainer: Trainer) -> tuple[int, dict]:
    """Load the newest checkpoint of a run; returns its step and the rest of its state."""
    newest = checkpoint.latest(folder)
    if newest is None:
        raise UserError(f"There is no checkpoint in {folder / 'checkpoints'}; start the run without --resume.")
    state = checkpoint.load(newest, trainer)
    return state["step"], state


def _update(trainer: Trainer, rows: list[Row] | None, progress: Progress) -> dict[str, float]:
    """One update on the rows of rank 0."""
    with progress.stage("update") as advance:
        metrics = trainer.update(rows, advance)
    return {f"train/{name}": value for name, value in metrics.items()}


def _validate(director: Director, step: int, progress: Progress) -> dict[str, float]:
    """Accuracy on the held-out questions, at the steps where the configuration asks for it."""
    if not director.config.validation.due(step, director.config.run.steps):
        return {}
    started = time.monotonic()
    with progress.stage("validation", director.held_out_questions) as advance:
        return director.validate(advance) | {"time/validation": time.monotonic() - started}


def _row(sample: Sample, config: Config) -> Row:
    """What the trainer learns of a sample: tokens, and the weight of its response tokens."""
    weight = sample.advantage * config.training.role_weights.get(sample.role, 1.0)
    return Row(
        tokens=np.array([*sample.prompt_ids, *sample.response_ids], dtype=np.int64),
        prompt_length=len(sample.prompt_ids),
        weights=np.full(len(sample.response_ids), weight, dtype=np.float32),
        rollout_logprobs=np.array(sample.logprobs, dtype=np.float32),
        routing=sample.routing,
    )
