"""The main job: roll out, update, push the weights, save; Algorithm 1 of the paper (arXiv 2509.23863)."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch.distributed as dist

from spell_megatron.config import Config, to_yaml
from spell_megatron.director import Director
from spell_megatron.errors import UserError
from spell_megatron.reporting.dumps import write_dump
from spell_megatron.reporting.metrics import MetricsLogger
from spell_megatron.reporting.progress import Progress, gain
from spell_megatron.rollout.engines import Engines
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.pipeline import OUTCOMES
from spell_megatron.training import backend, checkpoint
from spell_megatron.training.architecture import load_hf_config
from spell_megatron.training.model import build_model
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import load_weights
from spell_megatron.weights.push import WeightPusher
from spell_megatron.weights.reshard import export

# A gradient that is not finite skips its update, and so does a step without a mixed group; this many of
# either in a row end the run.
MAX_SKIPPED_IN_A_ROW = 5

# What to do when most attempts at a question end like this.
REMEDIES = {
    "questioner_prompt_too_long": "Raise rollout.sampling.max_prompt_tokens, or prepare shorter documents.",
    "responder_prompt_too_long": "Raise rollout.sampling.max_prompt_tokens, or prepare smaller clusters.",
    "truncated": "Raise rollout.sampling.max_response_tokens.",
    "bad_format": "The model does not follow the prompts of selfplay.prompts: read its questions in {dump}.",
}


def run(config: Config, resume: bool = False) -> None:
    """Train a policy by self-play; every trainer process calls it.

    Args:
        config: the checked configuration.
        resume: go on from the newest checkpoint of the run's folder.

    Raises:
        UserError: for faults that the user can mend; everything started here is stopped first.
    """
    folder, steps = config.run.output_dir / config.run.name, config.run.steps
    with ExitStack() as stack:
        stack.callback(backend.shutdown)
        backend.initialise(config)
        first = dist.get_rank() == 0
        progress = Progress(enabled=first)
        engines = None
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            with progress.stage("starting engines"):
                engines = stack.enter_context(Engines.open(config, folder / "logs"))
        with progress.stage("loading the policy"):
            trainer = _make_trainer(config)
            step, state = _restore(folder, trainer) if resume else (0, {})
        if first and (why := _no_replay(config, trainer, engines)):
            progress.line(f"Routing replay is off: {why}.")
        pusher = WeightPusher(engines)
        stack.callback(pusher.close)
        director = stack.enter_context(Director(config, engines)) if first else None
        resume_step = step if resume else None
        log = stack.enter_context(MetricsLogger(folder, config, resume_step=resume_step)) if first else None
        saver = stack.enter_context(checkpoint.Saver(folder, trainer))
        if director and resume:
            director.selfplay.load_state_dict(state["selfplay"])

        metrics = _push(pusher, trainer, step, progress, config.rollout.verify_weights)
        if director and not resume:
            metrics |= _validate(director, 0, progress)
            log.log(0, metrics)
            if director.held_out_questions:
                progress.validation(0, metrics)
        before, skipped, empty = metrics, 0, 0
        while step < steps:
            step += 1
            rows, metrics, started = None, {}, time.monotonic()
            if director:
                with progress.stage("rollout", config.selfplay.groups) as advance:
                    rollout = director.roll_out(step, str(step - 1), lambda mixed, _: advance(mixed))
                seconds = time.monotonic() - started
                speed = rollout.metrics["selfplay/generated_tokens"] / seconds
                metrics = rollout.metrics | {"time/rollout": seconds, "rollout/tokens_per_second": speed}
                rows = [_row(sample, config) for sample in rollout.batch]
                write_dump(rollout.samples, folder / "rollouts", step, config.logging.dump)
                del rollout  # the routings of its samples are large
                empty = 0 if rows else empty + 1
                if empty:
                    why = _why_empty(metrics, folder / "rollouts")
                    progress.line(f"step {step}: {why}")
                    if empty >= MAX_SKIPPED_IN_A_ROW:
                        raise UserError(
                            f"{empty} steps in a row had nothing to train on, so the run stops; the last: {why}"
                        )
            metrics |= _update(trainer, rows, progress)
            skipped = skipped + 1 if metrics.get("train/skipped") else 0
            if skipped >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"The gradient was not finite in {skipped} updates in a row (up to step {step}), so the run "
                    f"stops. Resume from the last good checkpoint in {folder / 'checkpoints'} with a smaller "
                    "training.optimizer.lr."
                )
            metrics |= _push(pusher, trainer, step, progress, config.rollout.verify_weights)
            saver.poll()
            if step == steps or step % config.checkpoint.every == 0:
                saving = time.monotonic()
                with progress.stage("checkpoint"):
                    state = {"step": step, "selfplay": director.selfplay.state_dict()} if director else {}
                    saver.save(step, state)
                metrics["time/checkpoint"] = time.monotonic() - saving
            if director:
                metrics["time/step"] = time.monotonic() - started
                metrics |= _validate(director, step, progress)
                log.log(step, metrics)
                progress.summary(step, steps, metrics)
        saver.finish()
        progress.line(f"{folder}: done after {steps} steps{gain(before, metrics)}")


def _make_trainer(config: Config) -> Trainer:
    hf_config = load_hf_config(config.model.path)
    model = build_model(hf_config, config)
    load_weights(model, hf_config, config.model.path)
    return Trainer(config, hf_config, model)


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
    """One update on the rows of rank 0; without rows (no group was mixed) there is none."""
    empty = [not rows]
    dist.broadcast_object_list(empty, src=0)
    if empty[0]:
        return {"train/empty": 1.0}
    with progress.stage("update") as advance:
        metrics = trainer.update(rows, advance)
    return {f"train/{name}": value for name, value in metrics.items()}


def _why_empty(metrics: dict[str, float], dumps: Path) -> str:
    """Why a step has nothing to train on: how its attempts at a question ended, and what to do about it."""
    rates = {outcome: metrics.get(f"selfplay/rate/{outcome}", 0.0) for outcome in OUTCOMES}
    ends = sorted((rate, outcome) for outcome, rate in rates.items() if rate)[::-1]
    text = "no question had both right and wrong answers: nothing to train on, the update is left out"
    if ends:
        shares = ", ".join(f"{rate:.0%} {outcome.replace('_', ' ')}" for rate, outcome in ends[:3])
        text += f" ({metrics['selfplay/clusters']:.0f} tried: {shares})"
    remedy = REMEDIES.get(ends[0][1], "Look into {dump}.") if ends else ""
    return f"{text}. {remedy.format(dump=dumps)}".strip()


def _push(
    pusher: WeightPusher, trainer: Trainer, step: int, progress: Progress, verify: bool
) -> dict[str, float]:
    """Send the weights to the engines; they are version `step` from then on."""
    with progress.stage("push"):
        stream = export(trainer.model, trainer.hf_config, everywhere=pusher.everywhere)
        push = pusher.push(stream, str(step), verify=verify)
    if push is None:
        return {}
    return {"time/push": push.seconds, "push/bytes": push.bytes, "push/verified": push.verified}


def _validate(director: Director, step: int, progress: Progress) -> dict[str, float]:
    """Accuracy on the held-out questions, at the steps where the configuration asks for it."""
    if not director.validates_at(step):
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
