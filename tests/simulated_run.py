"""Folders of runs without engines and trainer: real self-play, logging and dumps around a policy made of coin tosses.

What a trainer would log is made up here, under the names that a real run has; tests/test_train.py holds the report
against a real run. As a script: simulated_run.py FOLDER STEPS [SEED]. And folders of evaluations, scored and written
as real ones are.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from spell_megatron.config.reading import to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.evaluation import results
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.evaluate import write_scores
from spell_megatron.monitoring.dumps import write_dump
from spell_megatron.monitoring.metrics import MetricsLogger
from spell_megatron.monitoring.timeline import LANES
from spell_megatron.rollout.client import Completion
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.history import History
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler
from spell_megatron.selfplay.selfplay import SelfPlay

PAPER = ("docmath", "frames", "2wikimqa", "hotpotqa", "musique", "longbench-v2")


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    def prompt_ids(self, text: str, documents: Sequence[str] = ()) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def count(self, text: str) -> int:
        return len(text.split())


class Policy:
    """Answers better, and at greater length, with every step. `remark` is put into all that it writes."""

    def __init__(self, remark: str) -> None:
        self.step, self.remark = 0, remark

    async def generate(self, prompt_ids, *, n, seed, max_tokens, affinity, prompt_routing=True) -> list[Completion]:
        prompt = bytes(prompt_ids).decode()
        texts = [self._text(prompt, random.Random(seed + i)).encode() for i in range(n)]
        version = str(self.step - 1)
        return [
            Completion(list(t[:max_tokens]), [-0.5] * len(t), "length" if len(t) > max_tokens else "stop", version)
            for t in texts
        ]

    def _text(self, prompt: str, rng: random.Random) -> str:
        skill = 0.35 + 0.45 * (1 - math.exp(-self.step / 300))
        thoughts = f"<think>{self.remark} " + "Let me read again. " * rng.randrange(2 + int(12 * skill)) + "</think>"
        if "<write>" in prompt:
            kind = "fleet" if "number" in prompt.rsplit("<write>", 1)[1] else "seat"
            facts = [part.split(" is ") for part in prompt.split(". ") if f"The {kind} of" in part]
            if rng.random() < 0.2 * (1 - skill):
                return thoughts + "I would ask about the fleet."
            subject, answer = rng.choice(facts)
            question = f"What is the {kind} of {subject.split(' of ')[1]}? {self.remark}".strip()
            return thoughts + json.dumps({"question": question, "answer": answer.split(".")[0]}, ensure_ascii=False)
        if "<judge>" in prompt:
            reference, prediction = prompt.split("<reference> ")[1].split("\n<prediction> ")
            equal = reference == prediction.strip()
            vote = equal if rng.random() < 0.8 + 0.2 * skill else not equal
            return thoughts + ("hmm" if rng.random() < 0.03 else "[[YES]]" if vote else "[[NO]]")
        documents, question = prompt.split("<ask> ")
        subject = question.split("? ")[0].split("?")[0].removeprefix("What is the ")
        known = {
            part.split(" is ")[0].split("The ")[-1]: part.split(" is ")[1]
            for part in documents.split(". ")
            if " is " in part
        }
        # a question is as hard as its words; without documents there is little to go by
        chance = skill + 0.5 * (random.Random(subject).random() - 0.5) if known else 0.04
        guess = rng.choice(list(known.values())) if known else "unknown"
        return thoughts + f"The correct answer is {known.get(subject, '7') if rng.random() < chance else guess}."


def make_run(
    folder: Path,
    steps: int,
    seed: int = 0,
    dump: Literal["none", "jsonl", "parquet"] = "jsonl",
    remark: str = "",
) -> Path:
    """Write the folder of a run of `steps` steps; `remark` is in everything that the policy writes."""
    config = Config.model_validate(
        {
            "model": {"path": "policy"},
            "data": {"documents": "documents.parquet"},
            "run": {"output_dir": str(folder.parent), "name": folder.name, "steps": steps, "seed": seed},
            "selfplay": {
                "tasks": {"doc_general_qa": 1.0, "docmath_qa": 1.0},
                "prompts": "compact",
                "groups": 4,
                "group_size": 4,
                "clusters_per_round": 12,
                "questioner": {"new_documents": 2},
                "verifier": {"votes": 4},
                "gate": {"enabled": False},
            },
            "logging": {"dump": dump},
        }
    )
    rng = random.Random(seed)
    clusters = [_cluster(i, rng) for i in range(60)]
    play = config.selfplay
    sampler = ClusterSampler(clusters, play.tasks, {}, play.clusters_per_round, seed)
    history = History(play.questioner.history)
    selfplay = SelfPlay(play, config.rollout.sampling, PromptSet.load(play.prompts), Bytes(), sampler, history, seed)
    policy = Policy(remark)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with MetricsLogger(folder, config.logging, config.model_dump(mode="json")) as log, asyncio.Runner() as runner:
        log.log(0, _validation(0, rng))
        for step in range(1, steps + 1):
            policy.step = step
            rollout = runner.run(selfplay.roll_out(policy, step, str(step - 1)))
            write_dump(rollout.samples, folder / "rollouts", step, dump)
            metrics = rollout.metrics | _trainer(step, rng)
            if step == steps or step % 100 == 0:
                metrics |= _validation(step, rng)
            log.log(step, metrics)
    write_timeline(folder, steps)
    return folder


def write_timeline(folder: Path, steps: int) -> None:
    """A timeline of steps of 20 s, in which most of the update happens during the rollout; two of them wait."""
    lines, at = [], 1.8e9

    def add(step: int | None, name: str, start: float, seconds: float) -> None:
        lanes = LANES.get(name, ("trainer",))
        times = {"start": at + start, "end": at + start + seconds}
        lines.append(json.dumps({"step": step, "name": name, "lanes": lanes} | times) + "\n")

    add(None, "starting engines", -30, 25)
    for step in range(1, steps + 1):
        if step > 2:
            for piece in range(4):
                add(step, "accumulate", 4 + 3 * piece, 2)
        add(step, "rollout", 0, 16)
        add(step, "update", 16, 3 if step > 2 else 11)
        add(step, "push", 19.5 if step > 2 else 27.5, 0.5)
        at += 20 if step > 2 else 28
    (folder / "timeline.jsonl").write_text("".join(lines))


def _cluster(number: int, rng: random.Random) -> Cluster:
    names = [
        f"{rng.choice(('Hal', 'Bren', 'Tor', 'Mil'))}{rng.choice(('den', 'dolf', 'va'))}{number}{i}" for i in range(6)
    ]
    texts = [
        f"The seat of {n} is {rng.choice(('Mirel', 'Tarba', 'Kulzis'))}burg{n[-2:]}. "
        f"The fleet of {n} is {rng.randrange(10, 99)}. "
        for n in names
    ]
    return Cluster(f"fiction-{number}", tuple(texts), tuple(f"fiction-{number}/{n}" for n in names), "fiction")


def _validation(step: int, rng: random.Random) -> dict[str, float]:
    accuracy = 0.37 + 0.2 * (1 - math.exp(-step / 300)) + rng.gauss(0, 0.01)
    metrics: dict[str, float] = {"validation/question_set": 42, "time/validation": 9 + rng.random()}
    for name, gap, count in (("", 0, 500), ("doc_general_qa/", 0.03, 250), ("docmath_qa/", -0.03, 250)):
        metrics |= {f"validation/{name}pass@1": accuracy + gap, f"validation/{name}pass@4": accuracy + gap + 0.18}
        metrics |= {f"validation/{name}questions": count, f"validation/{name}standard_error": 0.4 / count**0.5}
    return metrics


def _trainer(step: int, rng: random.Random) -> dict[str, float]:
    noise = lambda: math.exp(rng.gauss(0, 0.1))  # noqa: E731
    rollout, update = 14 * noise(), 3 * noise()
    metrics = {
        "time/rollout": rollout,
        "rollout/tokens_per_second": 1500 * noise(),
        "rollout/restarts": 0,
        "train/loss": rng.gauss(0, 0.01),
        "train/entropy": (0.2 + 0.5 * math.exp(-step / 400)) * noise(),
        "train/mismatch_abs": 4e-3 * noise(),
        "train/mismatch_kl": 3e-5 * noise(),
        "train/importance_weight": 1.0,
        "train/importance_capped": 0.0,
        "train/top_probability": 0.9 - 0.2 * math.exp(-step / 400),
        "train/top_share": 0.88 - 0.2 * math.exp(-step / 400),
        "train/mismatch_max_ratio": 1.2 * noise(),
        "train/grad_norm": 0.5 * noise(),
        "train/lr": 1e-6,
        "train/skipped": 0.0,
        "train/response_tokens": 3000 * noise(),
        "train/tokens_unshared": 96000 * noise(),
        "train/tokens_computed": 17000 * noise(),
        "train/sharing": 5.5 * noise(),
        "train/microbatches": 5.0,
        "train/seconds": update,
        "train/tokens_per_second": 20000 * noise(),
        "time/push": 0.2 * noise(),
        "time/hidden": 0.6 * update if step > 2 else 0.0,
        "push/bytes": 3374592,
        "push/verified": 0,
        "time/step": rollout + update,
    }
    return metrics | ({"time/checkpoint": 2.0} if step % 50 == 0 else {})


def make_evaluation(
    folder: Path, skill: float, names: Sequence[str] = PAPER, samples: int = 8, judge: str | None = None
) -> Path:
    """Write the folder of an evaluation of 40 questions of each benchmark; questions differ in how hard they are."""
    answered = {name: [_answered(name, i, skill, samples, judge) for i in range(40)] for name in names}
    settings = {"model": f"runs/{folder.name}", "max_input": 16384, "max_output": 4096, "temperature": 0.7}
    settings |= {"top_p": 0.95, "seed": 0, "samples": samples} | ({"judge": judge} if judge else {})
    folder.mkdir(parents=True)
    write_scores(results.summarise(answered, settings), folder)
    return folder


def _answered(name: str, number: int, skill: float, samples: int, judge: str | None) -> results.Answered:
    rng = random.Random(f"{name}{number}")
    chance = min(1.0, 2 * skill * rng.random())
    subset = ("short", "long")[number % 2] if name in ("docmath", "longbench-v2") else ""
    made = []
    for _ in range(samples):
        right = int(rng.random() < chance)
        verdict = int(rng.random() < 0.2) if judge and not right else None
        made.append(results.Sample("x", right, rng.random() < 0.05, number % 5 == 0, 100, verdict))
    return results.Answered(BenchmarkQuestion(str(number), "doc_mc", "", "x", (), name, subset), made)


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
