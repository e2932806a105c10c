"""What can go wrong in a run, when it counts as wrong, and what to do about it: the banner of the report.

Each condition stands in one place, with its threshold, its words and its remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spell_megatron.config.schema import OptimizerConfig, SamplingConfig
from spell_megatron.monitoring import status
from spell_megatron.plural import counted
from spell_megatron.report.runs import Run
from spell_megatron.report.timing import duration
from spell_megatron.report.verdict import verdict
from spell_megatron.selfplay.outcomes import CANNOT_JUDGE, YES_APART, Outcome, remedy_for

RESUME = "Correct that, then continue the run with --resume."
FINITE = (
    "Continue from an earlier checkpoint with a smaller training.optimizer.lr. If already the first update was left "
    "out, see that the weights of model.path are sound."
)
LOOK = "Look into the run's folder logs/."


@dataclass(frozen=True)
class Finding:
    """Something that went wrong. `section` of the page shows more; `grave`: what the run learned is in doubt."""

    title: str
    text: str
    remedy: str
    section: str
    grave: bool


@dataclass(frozen=True)
class Condition:
    """Something that can go wrong: `find` says what happened in a run, and the remedy; None: all is well."""

    title: str
    section: str
    grave: bool
    find: Callable[[Run], tuple[str, str] | None]


CONDITIONS: list[Condition] = []


def findings(run: Run) -> list[Finding]:
    """All that went wrong in a run, grave things first."""
    found = [
        Finding(condition.title, *fault, condition.section, condition.grave)
        for condition in CONDITIONS
        if (fault := condition.find(run))
    ]
    return sorted(found, key=lambda finding: not finding.grave)


def condition(title: str, section: str, grave: bool = False) -> Callable:
    """Adds a function to the conditions."""

    def add(find: Callable[[Run], tuple[str, str] | None]) -> Callable:
        CONDITIONS.append(Condition(title, section, grave, find))
        return find

    return add


def recent(run: Run, name: str) -> float | None:
    """Mean of a metric over the last tenth of the steps that logged it, but at least three; None: it has none."""
    values = [value for value in run.column(name) if value is not None]
    last = values[-max(3, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def setting(run: Run, name: str, default: float) -> float:
    """A number of the run's configuration."""
    value = run.settings.get(name, default)
    return float(value) if isinstance(value, int | float) else default


def some(steps: Sequence[int]) -> str:
    """A few steps in words."""
    shown = ", ".join(map(str, steps[:5]))
    return f"step{'s' * (len(steps) > 1)} {shown}{', …' * (len(steps) > 5)}"


@condition("The run failed", "overview", grave=True)
def _failed(run: Run) -> tuple[str, str] | None:
    state = run.status or {}
    if state.get("state") != "failed":
        return None
    message = str(state.get("message") or "It did not say why.")
    if re.search("no space left|disk is full|quota", message, re.IGNORECASE):
        return message, "Free some space on the disk of run.output_dir, then continue the run with --resume."
    return message, f"{RESUME} {LOOK}"


@condition("The run gives no sign of life", "overview", grave=True)
def _silent(run: Run) -> tuple[str, str] | None:
    quiet = status.silent(run.status) if run.status else 0.0
    if not quiet:
        return None
    text = f"It was at work and has said nothing for {duration(quiet)}. Its process has probably been killed."
    return text, f"{LOOK} Continue the run with --resume."


@condition("The run ended before its last step", "overview")
def _stopped(run: Run) -> tuple[str, str] | None:
    """It was stopped, also before its last validation, or nothing says that it goes on."""
    state = (run.status or {}).get("state")
    if not run.planned or not run.steps or state not in (None, "stopped"):
        return None
    if run.steps[-1] < run.planned:
        how = "It was stopped" if state else "Nothing says that it is still going"
        return f"{how}; its last step is {run.steps[-1]} of {run.planned}.", "Continue it with --resume."
    return ("It was stopped before its last validation.", "Continue it with --resume.") if state else None


@condition("The policy was not trained", "training", grave=True)
def _untrained(run: Run) -> tuple[str, str] | None:
    """No step made an update, or each update had a learning rate or a gradient of 0."""
    known = [was for was in run.made if was is not None]
    if known and not any(known):
        text = f"None of {counted(len(known), 'step')} made an update: the weights are those of the start."
        if any(run.column("train/skipped")):
            return f"{text} The gradients were not finite.", FINITE
        return f"{text} There was nothing to train on.", _remedy(run)
    for name, what, remedy in (
        ("train/lr", "learning rate", "Set training.optimizer.lr."),
        ("train/grad_norm", "gradient", "See that the roles have a weight in training.role_weights."),
    ):
        values = [value for value, was in zip(run.column(name), run.made, strict=True) if was and value is not None]
        if values and not any(values):
            return (
                f"The {what} was 0 in each of {counted(len(values), 'update')}: the weights are those of the start.",
                remedy,
            )
    return None


@condition("Updates were left out", "training", grave=True)
def _skipped(run: Run, share: float = 0.01) -> tuple[str, str] | None:
    """More than this share of the updates had a gradient that was not finite."""
    left_out = [step for step, value in zip(run.steps, run.column("train/skipped"), strict=True) if value]
    updates = sum(value is not None for value in run.column("train/skipped"))
    if not left_out or len(left_out) <= share * updates or not any(run.made):
        return None
    return (
        f"{len(left_out)} of {counted(updates, 'update')} had a gradient that was not finite ({some(left_out)}).",
        FINITE,
    )


@condition("Numbers were not finite", "training", grave=True)
def _not_finite(run: Run) -> tuple[str, str] | None:
    """A number was NaN or infinite in a step whose update was not left out."""
    left_out = {step for step, value in zip(run.steps, run.column("train/skipped"), strict=True) if value}
    names = {name: [step for step in steps if step not in left_out] for name, steps in run.not_finite.items()}
    told = [f"{name} in {some(steps)}" for name, steps in names.items() if steps]
    return (f"NaN or infinity: {'; '.join(told[:4])}{'; …' * (len(told) > 4)}.", FINITE) if told else None


@condition("Steps had nothing to train on", "outcomes")
def _empty(run: Run, share: float = 0.1) -> tuple[str, str] | None:
    """More than this share of the steps found no mixed group."""
    empty = [step for step, value in zip(run.steps, run.column("train/empty"), strict=True) if value]
    steps = sum(step > 0 for step in run.steps)
    if len(empty) <= share * steps or not any(run.made):
        return None
    text = f"{len(empty)} of {counted(steps, 'step')} found no question with right and wrong answers ({some(empty)})."
    return text, _remedy(run)


@condition("Few questions teach", "outcomes")
def _few_mixed(run: Run, share: float = 0.05) -> tuple[str, str] | None:
    """Fewer than this share of the attempts end mixed."""
    mixed = recent(run, "selfplay/rate/mixed")
    if mixed is None or mixed >= share:
        return None
    return (
        f"Lately {mixed:.1%} of the attempts had right and wrong answers; {_ends(run, 'selfplay/')}.",
        _remedy(run),
    )


@condition("Most questions cannot be used", "outcomes")
def _unusable(run: Run, share: float = 0.5) -> tuple[str, str] | None:
    """More than this share of the attempts, over all tasks or in one, never come to answers."""
    prefixes = [
        "selfplay/",
        *sorted({m[0] for name in run.metrics if (m := re.match(r"selfplay/\w+/(?=rate/)", name))}),
    ]
    for prefix in prefixes:
        rates = {outcome: recent(run, f"{prefix}rate/{outcome}") or 0.0 for outcome in Outcome}
        unusable = {outcome: rate for outcome, rate in rates.items() if not outcome.answered and rate}
        if sum(unusable.values()) > share:
            task = prefix.removeprefix("selfplay/").rstrip("/")
            worst = max(unusable, key=lambda outcome: unusable[outcome])
            text = f"Lately {sum(unusable.values()):.0%} of the attempts{f' of {task}' if task else ''} failed"
            return f"{text}; {_ends(run, prefix)}.", worst.remedy.format(dumps="rollouts/")
    return None


def _remedy(run: Run) -> str:
    """What to do so that more questions teach."""
    prefix = "selfplay/rate/"
    names = [name.removeprefix(prefix) for name in run.metrics if name.startswith(prefix)]
    rates = {name: rate for name in names if (rate := recent(run, prefix + name)) is not None}
    return remedy_for({name: rate for name, rate in rates.items() if name != Outcome.MIXED}, "rollouts/")


def _ends(run: Run, prefix: str) -> str:
    rates = {outcome: recent(run, f"{prefix}rate/{outcome}") or 0.0 for outcome in Outcome}
    ends = sorted((o for o in Outcome if rates[o] >= 0.005), key=lambda o: -rates[o])
    return ", ".join(f"{rates[outcome]:.0%} {outcome.meaning}" for outcome in ends[:3])


@condition("The verifier does not judge", "verifier", grave=True)
def _verifier(run: Run, apart: float = YES_APART, invalid: float = 0.5) -> tuple[str, str] | None:
    """It says YES to wrong answers nearly as often as to right ones, or most of its votes are invalid."""
    remedy = f"Read its judgments below. {CANNOT_JUDGE}"
    lost = recent(run, "selfplay/rate/invalid_votes")
    if lost is not None and lost > invalid:
        return f"Lately {lost:.0%} of its votes were invalid.", remedy
    right, wrong = (recent(run, f"selfplay/rate/yes_on_{side}") for side in ("right", "wrong"))
    if right is None or wrong is None or right - wrong >= apart:
        return None
    return (
        f"Lately it said YES to {right:.0%} of the answers right by the rule, and to {wrong:.0%} of the others.",
        remedy,
    )


@condition("Engine and trainer disagree", "training", grave=True)
def _mismatch(run: Run, most: float = 0.05, share: float = 0.1) -> tuple[str, str] | None:
    """|d| of the log-probabilities is larger, on average lately or in more than this share of the steps.

    With top_p below 1 the engine's log-probabilities are higher by up to -log(top_p). With training.staleness they are
    of other weights.
    """
    if setting(run, "training.staleness", 0):
        return None
    top_p = setting(run, "rollout.sampling.top_p", SamplingConfig.model_fields["top_p"].default)
    limit = most - math.log(min(max(top_p, 0.01), 1.0))
    values = [value for value in run.column("train/mismatch_abs") if value is not None]
    mean, over = recent(run, "train/mismatch_abs"), sum(value > limit for value in values)
    if mean is None or (mean <= limit and over <= share * len(values)):
        return None
    text = (
        f"Their log-probabilities of a token differ by {mean:.2g} lately and {max(values):.2g} at most "
        f"(mean over a step's tokens); below {limit:.2g} would be usual."
    )
    return text, "Set rollout.verify_weights: true. If the weights agree, the engine computes this model otherwise."


@condition("Every gradient was clipped", "training")
def _clipped(run: Run, share: float = 0.95, updates: int = 3) -> tuple[str, str] | None:
    """This share of the updates, and so many of them at least, had a gradient over training.optimizer.clip_grad."""
    limit = setting(run, "training.optimizer.clip_grad", OptimizerConfig.model_fields["clip_grad"].default)
    norms = [value for value in run.column("train/grad_norm") if value is not None]
    over = [value for value in norms if value > limit > 0]
    if len(norms) < updates or len(over) < share * len(norms):
        return None
    text = (
        f"{len(over)} of {counted(len(norms), 'update')} had a gradient longer than training.optimizer.clip_grad "
        f"= {limit:g} (median {sorted(over)[len(over) // 2]:.3g}), so all steps have the same length."
    )
    return text, "Raise clip_grad to about the usual norm, and lower lr if the accuracy falls."


@condition("Answers are cut off", "results")
def _cut_off(run: Run, share: float = 0.5) -> tuple[str, str] | None:
    """More than this share of the answers reach the limit of tokens."""
    cut = recent(run, "selfplay/rate/truncated_answers")
    if cut is None or cut <= share:
        return None
    return f"Lately {cut:.0%} of the answers reached the token limit.", Outcome.TRUNCATED.remedy


@condition("Answers state no result", "results")
def _no_result(run: Run, share: float = 0.5) -> tuple[str, str] | None:
    """In more than this share of the answers no final answer is found."""
    lost = recent(run, "selfplay/rate/unparsed_answers")
    if lost is None or lost <= share:
        return None
    return f"Lately {lost:.0%} of the answers named no final answer.", Outcome.BAD_FORMAT.remedy.format(
        dumps="rollouts/"
    )


@condition("The policy hardly varies", "training")
def _collapsed(run: Run, nats: float = 0.01) -> tuple[str, str] | None:
    """The entropy of its next token is below this."""
    entropy = recent(run, "train/entropy")
    if entropy is None or entropy >= nats:
        return None
    text = f"The entropy of its next token is {entropy:.2g} nats lately: answers to a question are all alike."
    return (
        text,
        "Continue from an earlier checkpoint with a smaller training.optimizer.lr, or sample at a higher temperature.",
    )


@condition("Held-out accuracy fell", "results", grave=True)
def _worse(run: Run) -> tuple[str, str] | None:
    """By more than chance explains (see `verdict`)."""
    found = verdict(run)
    if found.kind != "worse":
        return None
    return found.text, "Use an earlier checkpoint (checkpoints/best.json names one), and lower training.optimizer.lr."


@condition("Engines had to be restarted", "speed")
def _restarts(run: Run) -> tuple[str, str] | None:
    restarts = [(step, value) for step, value in zip(run.steps, run.column("rollout/restarts"), strict=True) if value]
    if not restarts:
        return None
    total = round(sum(value for _, value in restarts))
    steps = some([step for step, _ in restarts])
    text = f"{counted(total, 'time')}, in {steps}. What was being written then was written again."
    return text, "The engines' logs in the folder logs/ say why they ended or hung."
