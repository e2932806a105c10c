"""Groups of answers, the batch, advantages, the sampler.

Decided: only mixed questions enter the history, none twice; no truncation of rows to the number of GPUs, as
many verifier groups as there are; questioner rows are normalised per task (or batch) and a task with fewer
than two has advantage 0.
"""

from __future__ import annotations

import random
from collections import Counter
from statistics import mean, stdev
from typing import Any

from spell_megatron.config.selfplay_sections import QuestionerConfig, SelfPlayConfig, VerifierConfig
from spell_megatron.selfplay import batch, rewards, sampler
from spell_megatron.selfplay.advantages import assign_advantages
from spell_megatron.selfplay.history import Entry, History
from spell_megatron.selfplay.outcomes import Outcome
from vectors.functions import equal, function
from vectors.questions import REWARDS


def decide_filter(input: dict, expected: Any) -> Any:
    memory = {key: [list(entry) for entry in entries] for key, entries in input.get("history", {}).items()}
    for uid, values in input["scores"].items():
        entries = memory.setdefault(f"t_{uid}", [])
        if 0 < mean(values) < 1 and f"Q{uid}" not in [question for _, question, _ in entries]:
            entries.append([[0], f"Q{uid}", f"A{uid}"])
        memory[f"t_{uid}"] = entries[-3:]
    return {**expected, "memory": {key: entries for key, entries in memory.items() if entries}}


@function("group_filter", decide_filter)
def _(input: dict) -> Any:
    config = QuestionerConfig()
    history = History(config.history)
    stored = input.get("history", {})
    history.load_state_dict({"entries": [["t", key.removeprefix("t_"), stored[key]] for key in stored]})
    keys = [*stored, *(f"t_{uid}" for uid in input["scores"])]
    for uid, values in input["scores"].items():
        if rewards.admissible(mean(values), config):
            history.admit("t", uid, Entry((0,), f"Q{uid}", f"A{uid}"))
    memory = {
        key: [[list(e.documents), e.question, e.answer] for e in history.entries("t", key.removeprefix("t_"))]
        for key in keys
    }
    return {
        "kept": [uid for uid, values in input["scores"].items() if rewards.mixed(values)],
        "zero_variance": [uid for uid, values in input["scores"].items() if not rewards.mixed(values)],
        "memory": {key: entries for key, entries in memory.items() if entries},
    }


KINDS = {
    "good": Outcome.MIXED,
    "bad_format": Outcome.BAD_FORMAT,
    "bad_ground": Outcome.UNGROUNDED,
    "zero_variance": Outcome.ALL_0,
}
"""The reference's kinds of questions, and how the attempts at them end here."""


def kind_of(sample: batch.Sample) -> str:
    return next(kind for kind, outcome in KINDS.items() if outcome is sample.outcome)


def sample(uid: str, role: batch.Role, task: str, kind: str = "good", reward: float = 0.0) -> batch.Sample:
    return batch.Sample(
        uid=uid,
        group=uid,
        role=role,
        task=task,
        outcome=KINDS[kind],
        cluster_id=uid,
        prompt_ids=[],
        response_ids=[],
        logprobs=[],
        weight_version="0",
        reward=reward,
    )


def merged_kinds(input: dict, result: dict) -> dict:
    """Where a task has negatives of several kinds, chance decides which are drawn: count them together."""
    tasks = [key.partition("/")[0] for key in input["bad"]]
    if len(set(tasks)) == len(tasks):
        return result
    kinds = Counter(result["by_role_type"])
    negative = sum(kinds.pop(f"questioner/{k}", 0) for k in ("bad_format", "bad_ground", "zero_variance"))
    return {**result, "by_role_type": {**kinds, "questioner/negative": negative}}


def decide_batch(input: dict, expected: dict) -> dict:
    n, ratio, share = input["n"], input.get("bad_ratio", 1), input.get("verifier_ratio", 0.125)
    available = Counter()
    for key, count in input["bad"].items():
        available[key.partition("/")[0]] += count
    positives, left = {}, input["batch"]  # the first groups, in the order given
    for task, count in input["good_per_task"].items():
        positives[task] = min(count, left)
        left -= positives[task]
    wanted, by_kind = 0.0, Counter()
    for task in sorted(positives, key=lambda task: -positives[task]):
        if positives[task]:
            wanted += ratio * positives[task]
            drawn = min(available[task], int(wanted))
            wanted -= drawn
            kind = next((key.partition("/")[2] for key in input["bad"] if key.startswith(f"{task}/")), "none")
            by_kind[f"questioner/{kind}"] += drawn
    good, negative = sum(positives.values()), sum(by_kind.values())
    judged = n * min(input["verifier_groups_available"], int(good * n * share / n))
    by_kind += Counter({"questioner/good": good, "responder/good": good * n, "verifier/good": judged})
    roles = Counter({"responder": good * n, "questioner": good + negative, "verifier": judged})
    result = {
        "ready": good >= input["batch"],
        "total": sum(roles.values()),
        "by_role": {role: count for role, count in roles.items() if count},
        "by_role_type": dict(by_kind),
    }
    merged = merged_kinds(input, result)
    return expected if equal(merged, merged_kinds(input, expected)) else merged


def run_batch(input: dict) -> dict:
    n = input["n"]
    config = SelfPlayConfig(
        groups=input["batch"],
        group_size=n,
        negatives_per_positive=input.get("bad_ratio", 1),
        verifier=VerifierConfig(share=input.get("verifier_ratio", 0.125)),
    )
    groups = []
    for task, count in input["good_per_task"].items():
        for i in range(count):
            uid = f"{task}/{i}"
            answers = [sample(uid, "responder", task) for _ in range(n)]
            groups.append(batch.Group(uid, task, sample(uid, "questioner", task), answers))
    negatives = [
        sample(f"{key}/{i}", "questioner", key.partition("/")[0], key.partition("/")[2])
        for key, count in input["bad"].items()
        for i in range(count)
    ]
    judgments = [
        [sample(f"v{i}", "verifier", "t") for _ in range(n)] for i in range(input["verifier_groups_available"])
    ]
    rows = batch.compose(groups, negatives, judgments, config, random.Random(0))
    return {
        "ready": len(groups) >= config.groups,
        "total": len(rows),
        "by_role": dict(Counter(row.role for row in rows)),
        "by_role_type": dict(Counter(f"{row.role}/{kind_of(row)}" for row in rows)),
    }


@function("batch_composition", decide_batch, sees_wanted=True)
def _(input: dict, wanted: dict) -> Any:
    """Ours, with kinds counted together where the wanted result has them so."""
    ours = run_batch(input)
    return merged_kinds(input, ours) if "questioner/negative" in wanted["by_role_type"] else ours


def row_rewards(input: dict) -> list[float]:
    """Rewards of rows: given for responder and verifier, the mapped ones for the questioner."""
    config = QuestionerConfig(reward=REWARDS[input["questioner_reward"]])
    result = []
    for row in input["rows"]:
        if row["role"] != "questioner":
            result.append(float(row["score"]))
        else:
            answers = [r["score"] for r in input["rows"] if r["uid"] == row["uid"] and r["role"] == "responder"]
            result.append(rewards.question_reward(KINDS[row["type"]], mean(answers or [0]), config))
    return result


def decide_advantages(input: dict, expected: dict) -> dict:
    """Ours are the reference's but for questioner rows, which are normalised per task."""
    decided = list(expected["advantage"])
    for task in {row["task"] for row in input["rows"]}:
        members = [i for i, r in enumerate(input["rows"]) if r["role"] == "questioner" and r["task"] == task]
        values = [expected["score"][i] for i in members]
        for i in members:
            spread = stdev(values) if len(values) > 1 else 0.0
            decided[i] = (expected["score"][i] - mean(values)) / (spread + 1e-6)
    return {**expected, "advantage": decided}


@function("advantages", decide_advantages)
def _(input: dict) -> Any:
    values = row_rewards(input)
    rows = [
        sample(row["uid"], row["role"], row["task"], row["type"], value)
        for row, value in zip(input["rows"], values, strict=True)
    ]
    assign_advantages(rows, "task")  # what the reference calls "batch" is per task
    return {"advantage": [row.advantage for row in rows], "score": values}


@function("domain_sampler.counts")
def _(input: dict) -> Any:
    return sampler.round_counts(input["sizes"], input["weights"], input["batch"])
