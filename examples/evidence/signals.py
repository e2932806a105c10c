"""What tells a right reference from a wrong one, without labels? Measures signals on the quick start's questions.

    python examples/evidence/signals.py [--policy FOLDER] [--clusters 300] [--shown 2] [--samples 8] [--jobs 1]

A policy (by default the one that the quick start begins with) asks a question over `shown` documents of each cluster,
with the settings of examples/quickstart.yaml. Then it answers each usable question `samples` times in several ways. A
signal is the share of such answers that reach the reference. The facts of the documents tell which references are
right.

It prints a table. Columns: AUC, the probability that a right reference has a higher signal than a wrong one (ties count
half), over all questions and over those with mixed answers. Then for thresholds of the signal: how many questions pass,
how many references of these are right, and how many of the right ones pass.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fictional_world import questions  # noqa: E402
from make_quickstart_corpus import training_clusters  # noqa: E402

from spell_megatron.config.reading import load_config  # noqa: E402
from spell_megatron.evaluation.policies import Policy, engine_policy  # noqa: E402
from spell_megatron.rollout.engines import Engines  # noqa: E402
from spell_megatron.selfplay.documents import Cluster, load_clusters  # noqa: E402
from spell_megatron.selfplay.names import unknown_names  # noqa: E402
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question  # noqa: E402
from spell_megatron.selfplay.prompts import PromptSet  # noqa: E402
from spell_megatron.selfplay.scoring import rule_score  # noqa: E402
from spell_megatron.selfplay.seeds import derive_seed  # noqa: E402
from spell_megatron.tokenizer import PolicyTokenizer  # noqa: E402

CONFIG = ROOT / "examples" / "quickstart.yaml"
THRESHOLDS = (0.5, 0.75, 1.0)


@dataclass
class Asked:
    """A usable question, whether its reference is right, and its signals by name."""

    cluster: Cluster
    question: Question
    shown: list[int]
    right: bool
    answerable: bool
    signals: dict[str, float] = field(default_factory=dict)


class Experiment:
    def __init__(self, policy: Policy, prompts: PromptSet, tokenizer: PolicyTokenizer, samples: int) -> None:
        self.policy, self.prompts, self.tokenizer, self.samples = policy, prompts, tokenizer, samples

    async def ask(self, cluster: Cluster, task: str, facts: dict[str, str], shown: int, limit: int) -> Asked | None:
        """The policy's question over some documents of a cluster; None if it is not usable."""
        rng = random.Random(cluster.id)
        documents = sorted(rng.sample(range(len(cluster.documents)), shown))
        prompt = self.prompts.questioner(task, [cluster.documents[i] for i in documents], [], None)
        reply = await self.policy.sample(self.policy.prompt(prompt)[0], derive_seed(cluster.id, "question"), cluster.id)
        question = parse_question(task, reply.text, reply.cut, self.tokenizer.count, limit)
        if not isinstance(question, Question):
            return None
        truth = facts.get(question.text.strip())
        return Asked(cluster, question, documents, truth == question.reference.strip(), truth is not None)

    async def share(self, asked: Asked, name: str, documents: Callable[[random.Random], Sequence[int]]) -> None:
        """Note the share of answers that reach the reference; `documents` draws what each answer is shown."""

        async def one(index: int) -> int:
            seed = derive_seed(asked.cluster.id, name, index)
            texts = [asked.cluster.documents[i] for i in documents(random.Random(seed))]
            prompt = self.prompts.responder(asked.question.task, asked.question.text, texts)
            reply = await self.policy.sample(self.policy.prompt(prompt)[0], seed, asked.cluster.id)
            prediction = parse_answer(asked.question.task, reply.text, reply.cut)
            return rule_score(asked.question.task, prediction, asked.question.reference)

        asked.signals[name] = float(np.mean(await asyncio.gather(*map(one, range(self.samples)))))

    async def measure(self, asked: Asked) -> None:
        """All signals of a question."""
        everything, source = range(len(asked.cluster.documents)), asked.shown
        others = [i for i in everything if i not in source]

        def shuffled(indices: Sequence[int]) -> Callable[[random.Random], Sequence[int]]:
            return lambda rng: rng.sample(indices, len(indices))

        def distracted(count: int) -> Callable[[random.Random], Sequence[int]]:
            def draw(rng: random.Random) -> Sequence[int]:
                mixed = [*source, *rng.sample(others, min(count, len(others)))]
                return rng.sample(mixed, len(mixed))

            return draw

        fixed = sorted(distracted(2)(random.Random(asked.cluster.id)))
        await asyncio.gather(
            self.share(asked, "all documents", lambda rng: everything),
            self.share(asked, "all documents, own orders", shuffled(everything)),
            self.share(asked, "source", lambda rng: source),
            self.share(asked, "source, own orders", shuffled(source)),
            self.share(asked, "source and 2 others", lambda rng: fixed),
            self.share(asked, "source and 1 other, own orders", distracted(1)),
            self.share(asked, "source and 2 others, own orders", distracted(2)),
            self.share(asked, "source and 4 others, own orders", distracted(4)),
        )
        stands = not unknown_names(asked.question.text, [asked.cluster.documents[i] for i in source])
        signals = asked.signals
        signals["names in source"] = float(stands)
        for other in ("source", "source and 2 others, own orders"):
            signals[f"names, {other}"] = stands * signals[other]


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Probability that a signal of a right reference is higher than one of a wrong reference."""
    difference = np.subtract.outer(right, wrong)
    return float(np.mean((difference > 0) + (difference == 0) / 2)) if difference.size else float("nan")


def table(found: Sequence[Asked]) -> str:
    mixed = [asked for asked in found if 0 < asked.signals["all documents"] < 1]
    thresholds = [f"≥ {t:g}: pass, right, kept" for t in THRESHOLDS]
    lines = [f"| signal | AUC | AUC, mixed | {' | '.join(thresholds)} |", "|---" * (3 + len(thresholds)) + "|"]
    for name in found[0].signals:
        cells = []
        for some in (found, mixed):
            values = [[a.signals[name] for a in some if a.right is right] for right in (True, False)]
            cells.append(f"{auc(*values):.3f}")
        for threshold in THRESHOLDS:
            passed = [a for a in mixed if a.signals[name] >= threshold]
            right = sum(a.right for a in passed)
            kept = right / max(sum(a.right for a in mixed), 1)
            cells.append(f"{len(passed)}, {right / max(len(passed), 1):.0%}, {kept:.0%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    wrong = [asked for asked in found if not asked.right]
    lines.append(
        f"\n{len(found)} usable questions, {np.mean([a.right for a in found]):.0%} with right references; "
        f"{len(mixed)} with mixed answers, {np.mean([a.right for a in mixed]):.0%} right; "
        f"{np.mean([not a.answerable for a in wrong]):.0%} of the wrong references belong to questions that the "
        "documents do not answer."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=ROOT / "examples" / "quickstart" / "policy")
    parser.add_argument("--clusters", type=int, default=300)
    parser.add_argument("--shown", type=int, default=2, help="documents that the questioner sees")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    config = load_config([CONFIG], [f"model.path={options.policy}", f"rollout.threads={options.threads}"])
    tokenizer, prompts = PolicyTokenizer(config.model.path), PromptSet.load(config.selfplay.prompts)
    clusters = load_clusters(config.data.documents)[: options.clusters]
    facts = [{fact.text: fact.answer for fact in questions(c)} for c in training_clusters(options.clusters)]

    async def run(engines: Engines) -> list[Asked]:
        async with engine_policy(engines, tokenizer, config.rollout) as policy:
            experiment = Experiment(policy, prompts, tokenizer, options.samples)
            limit = config.selfplay.questioner.max_reference_tokens
            tasks = (
                "doc_general_qa",
                "doc_general_qa",
                "doc_general_qa",
                "docmath_qa",
            )  # as selfplay.tasks shares them
            asked = await asyncio.gather(
                *(
                    experiment.ask(cluster, tasks[i % 4], known, options.shown, limit)
                    for i, (cluster, known) in enumerate(zip(clusters, facts, strict=True))
                )
            )
            found = [one for one in asked if one is not None]
            await asyncio.gather(*map(experiment.measure, found))
            return found

    with (
        TemporaryDirectory() as logs,
        Engines.open(
            config.model, config.rollout, Path(logs), device="cpu", seed=0, routing=False, trainers=0
        ) as engines,
    ):
        print(table(asyncio.run(run(engines))))


if __name__ == "__main__":
    main()
