"""The numbers of a step of self-play: rates of outcomes, votes, the history, the batch's make-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import ROLES, Sample
from spell_megatron.selfplay.history import History
from spell_megatron.selfplay.outcomes import Outcome

# What is counted in `Attempt.counts`, as a share of what else is counted there.
COUNTED_RATES = (
    ("invalid_votes", "votes"),
    ("tied_votes", "judged_answers"),
    ("unanimous_votes", "judged_answers"),
    ("no_verdict", "judged_answers"),
    ("verdict_against_rule", "judged_answers"),
    ("right_by_verdict_only", "judged_answers"),
    ("right_by_rule_only", "judged_answers"),
    ("agreeing_votes", "decisive_votes"),
    ("yes_on_right", "valid_votes_on_right"),
    ("yes_on_wrong", "valid_votes_on_wrong"),
    ("no_context_right", "no_context_answers"),
    ("gate_answers_reaching_reference", "gate_answers"),
    ("quotes_found", "quotes"),
    ("unknown_names", "checked_names"),
)
COUNTS = ("context_documents_cut", "verifier_prompt_too_long", "gate_prompt_tokens", "gate_response_tokens")


def vote_counts(votes: Sequence[int], verdict: int | None, rule: int) -> dict[str, int]:
    """What to count of the judgments of one answer: `votes` are 1, 0 or -1, `rule` is the rule check's score."""
    yes, no = votes.count(1), votes.count(0)
    side = "right" if rule else "wrong"
    return {
        "votes": len(votes),
        "invalid_votes": votes.count(-1),
        "judged_answers": 1,
        "no_verdict": verdict is None,
        "tied_votes": yes == no and yes > 0,
        "unanimous_votes": max(yes, no) == len(votes),
        "verdict_against_rule": verdict is not None and verdict != rule,
        "right_by_verdict_only": verdict == 1 and rule == 0,
        "right_by_rule_only": verdict == 0 and rule == 1,
        "decisive_votes": 0 if verdict is None else yes + no,
        "agreeing_votes": 0 if verdict is None else votes.count(verdict),
        f"yes_on_{side}": yes,
        f"valid_votes_on_{side}": yes + no,
    }


def step_metrics(
    attempts: Sequence[Attempt],
    admitted: int,
    batch: Sequence[Sample],
    tasks: Collection[str],
    history: History,
    entered: int,
) -> dict[str, float]:
    """Flat metrics of a step.

    Args:
        attempts: those that the step uses.
        admitted: number of all clusters that were begun.
        batch: the rows of the update.
        entered: number of questions that the step added to the history.
    """
    metrics: dict[str, float] = {
        "selfplay/clusters": len(attempts),
        "selfplay/surplus_clusters": admitted - len(attempts),
        "selfplay/mixed_groups": sum(attempt.mixed for attempt in attempts),
    }
    metrics |= _rates("selfplay/", attempts)
    for task in tasks:
        metrics |= _rates(f"selfplay/{task}/", [attempt for attempt in attempts if attempt.task == task])
    metrics |= _batch_metrics(batch)
    depths = history.depths()
    metrics["history/clusters"] = len(depths)
    metrics["history/mean_depth"] = _mean(depths) if depths else 0.0
    metrics["history/entered"] = entered
    samples = [sample for attempt in attempts for sample in attempt.samples]
    metrics["selfplay/generated_tokens"] = sum(len(sample.response_ids) for sample in samples)
    return metrics


def _batch_metrics(batch: Sequence[Sample]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for role in ROLES:
        rows = [sample for sample in batch if sample.role == role]
        metrics[f"batch/{role}/rows"] = len(rows)
        if rows:
            metrics[f"batch/{role}/reward"] = _mean(row.reward for row in rows)
            metrics[f"batch/{role}/response_tokens"] = _mean(len(row.response_ids) for row in rows)
            metrics[f"batch/{role}/truncated"] = _mean(row.truncated for row in rows)
    return metrics


def _rates(prefix: str, attempts: Sequence[Attempt]) -> dict[str, float]:
    """Rates of the outcomes, and of what was counted on the way, among these attempts."""
    if not attempts:
        return {}
    outcomes = Counter(attempt.outcome for attempt in attempts)
    rates = {f"{prefix}rate/{outcome}": outcomes[outcome] / len(attempts) for outcome in Outcome}
    valid = sum(outcomes[outcome] for outcome in Outcome if outcome.valid)
    rates[f"{prefix}rate/valid"] = valid / len(attempts)
    rates[f"{prefix}history_depth"] = _mean(attempt.remembered for attempt in attempts)
    rates |= _role_means(prefix, [sample for attempt in attempts for sample in attempt.samples])
    rates |= _answer_means(prefix, [answer for attempt in attempts for answer in attempt.answers])
    counts: Counter[str] = Counter()
    for attempt in attempts:
        counts.update(attempt.counts)
    for name, total in COUNTED_RATES:
        if counts[total]:
            rates[f"{prefix}rate/{name}"] = counts[name] / counts[total]
    for name in COUNTS:
        rates[f"{prefix}count/{name}"] = counts[name]
    questions = [attempt.question for attempt in attempts if attempt.question]
    if questions:
        rates[f"{prefix}context_documents"] = _mean(len(question.document_ids) for question in questions)
    return rates


def _role_means(prefix: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Means over all that each role wrote."""
    means: dict[str, float] = {}
    for role in ROLES:
        rows = [sample for sample in samples if sample.role == role]
        if rows:
            means[f"{prefix}{role}/reward"] = _mean(row.reward for row in rows)
            means[f"{prefix}{role}/prompt_tokens"] = _mean(len(row.prompt_ids) for row in rows)
            means[f"{prefix}{role}/response_tokens"] = _mean(len(row.response_ids) for row in rows)
    return means


def _answer_means(prefix: str, answers: Sequence[Sample]) -> dict[str, float]:
    if not answers:
        return {}
    return {
        f"{prefix}reward": _mean(answer.reward for answer in answers),
        f"{prefix}rule_score": _mean(answer.rule_score or 0 for answer in answers),
        f"{prefix}rate/truncated_answers": _mean(answer.truncated for answer in answers),
        f"{prefix}rate/unparsed_answers": _mean(answer.prediction is None for answer in answers),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
