"""Make the quick start's policy: a sentencepiece tokenizer and a tiny language model.

    python tools/make_seed_policy.py [--out examples/quickstart/policy]

The policy is taught the formats of the three roles and basic reading of the fictional world, nothing more:
it stops at LESSONS updates although it still gets better, so that self-play has something to find out. One
thread, a fixed number of steps and fixed seeds: the same machine makes the same policy again. At the end it
prints how well each role does on the held-out questions and on clusters of its own.

How it learns to read in minutes: first copying of random words, then one document, then two, with larger
clusters in between so that no distance is new to it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fictional_world import (
    GENERAL,
    MATH,
    RELATIONS,
    VALUES,
    Entity,
    Fact,
    draw_question,
    make_cluster,
    question_for,
    questions,
    relation_baseline,
    statement,
    wrong_answer,
)
from tiny_policy import (
    LEARNING_RATE,
    MARKERS,
    PAD,
    ROLES,
    SPECIAL,
    Codec,
    Example,
    answer_text,
    copy_batch,
    example,
    learn,
    make_model,
    make_optimizer,
    pack,
    question_text,
    sample,
    save,
    set_learning_rate,
    share,
    verdict_text,
    write_tokenizer,
)
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question, parse_verdict
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.scoring import rule_score

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
TASKS = (GENERAL, MATH)
LESSONS = 1000
"""Updates after copying and single documents have been learned."""
LARGE_SHARE, LARGEST = 0.25, 9
"""How many of those are on clusters of three documents or more, and of how many at most."""
WORDS = "Empty word number choice another The Therefore, the correct answer is 1 2 3"
"""Words of the prompts and the roles' answers."""


def history_entry(fact: Fact) -> Entry:
    """An earlier question as the prompt lists it."""
    return Entry(documents=(), question=fact.text, answer=fact.answer)


def make_tokenizer(folder: Path) -> None:
    """Write the tokenizer, in which every word of the world is one piece."""
    relations = [relation for kind in RELATIONS.values() for relation in kind]
    text = " ".join(
        [statement("", "", ""), question_for("", ""), WORDS, *relations, *(v for pool in VALUES.values() for v in pool)]
    )
    write_tokenizer(folder, sorted(set(re.findall(r"\w+,?", text))))


# Lessons.


class Teacher:
    """Draws clusters and examples. The generator's facts are right, and so is every lesson."""

    def __init__(self, codec: Codec, prompts: PromptSet, seed: str) -> None:
        self.codec = codec
        self.prompts = prompts
        self.rng = random.Random(seed)

    def cluster(self, size: int) -> tuple[list[Entity], list[Fact]]:
        """A cluster that has questions of both tasks."""
        while True:
            entities = make_cluster(self.rng, size)
            facts = questions(entities)
            if {fact.task for fact in facts} == set(TASKS):
                return entities, facts

    def responder(self, entities: Sequence[Entity], facts: Sequence[Fact]) -> Example:
        fact = draw_question(self.rng, facts, self.rng.choice(TASKS))
        prompt = self.prompts.responder(fact.task, fact.text, [entity.text for entity in entities])
        return example(self.codec, "responder", prompt, answer_text(fact.task, fact.answer), fact.answer, 0.1)

    def questioner(self, entities: Sequence[Entity], facts: Sequence[Fact]) -> Example:
        """Half of the prompts list earlier questions of the same task; the new one differs from them."""
        task = self.rng.choice(TASKS)
        own = [fact for fact in facts if fact.task == task]
        fact = draw_question(self.rng, own, task)
        others = [other for other in own if other is not fact]
        shown = self.rng.sample(others, min(len(others), self.rng.choice((0, 0, 0, 1, 2, 3))))
        prompt = self.prompts.questioner(
            task, [entity.text for entity in entities], [history_entry(other) for other in shown], None
        )
        return example(self.codec, "questioner", prompt, question_text(fact.text, fact.answer), fact.answer, 1.0)

    def verifier(self, facts: Sequence[Fact]) -> Example:
        fact = draw_question(self.rng, facts, self.rng.choice(TASKS))
        right = self.rng.random() < 0.5
        prediction = fact.answer if right else wrong_answer(self.rng, facts, fact)
        prompt = self.prompts.verifier(fact.text, prediction, fact.answer)
        return example(self.codec, "verifier", prompt, verdict_text(right), verdict_text(right), 0.1)

    def cloze(self, entities: Sequence[Entity], facts: Sequence[Fact]) -> Example:
        """A sentence of the documents again, to be completed."""
        entity = self.rng.choice(entities)
        key, value = self.rng.choice(list(entity.facts.items()))
        sentence = statement(key, entity.name, value)
        texts = [entity.text for entity in entities]
        documents, _, _ = self.prompts.responder(MATH, "", texts).partition("<ask>")
        before, _, after = sentence.rpartition(value)
        return example(self.codec, "cloze", documents + before, value + after, value, 0.1)

    def row(self, size: int) -> list[Example]:
        """Examples over one cluster: all roles over one or two documents, the responder over more."""
        entities, facts = self.cluster(size)
        examples = [self.responder(entities, facts) for _ in range(6)]
        if size <= 2:
            examples += [self.questioner(entities, facts) for _ in range(5)]
            examples += [self.cloze(entities, facts) for _ in range(4)]
            examples += [self.verifier(facts) for _ in range(3)]
        return examples


# Training.


def train(model: Qwen3ForCausalLM, teacher: Teacher, lessons: int) -> None:
    """Teach copying until 85 % are right, then single documents until 90 % are, then `lessons` updates of
    clusters."""
    optimizer = make_optimizer(model)
    words = range(len(SPECIAL) + len(MARKERS), teacher.codec.size)
    accuracy = dict.fromkeys(ROLES[1:], 0.0)
    stage, left, step, tokens, start = "copying", lessons, 0, 0, time.process_time()
    while left:
        step += 1
        set_learning_rate(optimizer, LEARNING_RATE * min(1.0, step / 50))
        size = 1 if stage == "single documents" else 2
        if stage == "clusters":
            left -= 1
            if teacher.rng.random() < LARGE_SHARE:
                size = teacher.rng.randint(3, LARGEST)
        if stage == "copying":
            batch = copy_batch(teacher.rng, 40, words)
        else:
            batch = pack([teacher.row(size) for _ in range(max(4, int(14 / (size + 1) ** 0.5)))])
        loss, chosen, targets, keys = learn(model, optimizer, batch)

        right = (chosen == targets).float()
        for i, role in enumerate(ROLES):
            if i and size <= 2 and (keys == i).any():
                accuracy[role] += 0.05 * (right[keys == i].mean().item() - accuracy[role])
        tokens += int((batch.tokens != PAD).sum())
        learned = stage
        if stage == "copying" and accuracy["copy"] > 0.85:
            stage = "single documents"
        elif stage == "single documents" and accuracy["responder"] > 0.9:
            stage = "clusters"
        if stage != learned:
            print(f"step {step}: {learned} learned", flush=True)
        if step % 100 == 0 or not left:
            seconds = time.process_time() - start
            shares = " ".join(f"{role} {share:.2f}" for role, share in accuracy.items())
            print(
                f"step {step} {seconds:.0f} s of CPU {tokens / 1e6:.2f} M tokens "
                f"{tokens / seconds:.0f} tokens/s loss {loss:.3f} {shares}",
                flush=True,
            )


def check_responder(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    rows: Sequence[dict],
    temperature: float,
    documents: bool = True,
) -> dict[str, float]:
    """Percentage right per task on held-out questions, by the rules that self-play uses."""
    ids = [
        codec.prompt(prompts.responder(row["task"], row["question"], row["documents"] if documents else None))
        for row in rows
    ]
    scores: dict[str, list[bool]] = {}
    for row, response in zip(rows, sample(model, ids, 16, temperature), strict=True):
        prediction = parse_answer(row["task"], codec.decode(response), len(response) == 16)
        scores.setdefault(row["task"], []).append(bool(rule_score(row["task"], prediction, row["answer"])))
    return {**{task: share(hits) for task, hits in scores.items()}, "all": share(sum(scores.values(), []))}


def check_questioner(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    clusters: Sequence[list[Entity]],
    temperature: float,
    shown: int = 2,
    history: bool = False,
) -> dict[str, float]:
    """Percentage of questions that parse, that the documents answer, and whose reference is that answer.

    Also the percentage of two-hop questions among the answerable ones, and, with a history of up to three
    questions in the prompt, the percentage that repeats one of them.
    """
    rng = random.Random(0)
    asked, ids = [], []
    for number, cluster in enumerate(clusters):
        task = TASKS[number % 2]
        facts = [fact for fact in questions(cluster[:shown]) if fact.task == task]
        earlier = rng.sample(facts, min(3, len(facts) - 1)) if history else []
        asked.append((task, {fact.text: fact for fact in questions(cluster)}, {fact.text for fact in earlier}))
        ids.append(
            codec.prompt(
                prompts.questioner(
                    task,
                    [entity.text for entity in cluster[:shown]],
                    [history_entry(fact) for fact in earlier],
                    None,
                )
            )
        )
    parsed, answerable, correct, repeated, two_hop = [], [], [], [], []
    for (task, facts, earlier), response in zip(asked, sample(model, ids, 64, temperature), strict=True):
        question = parse_question(task, codec.decode(response), len(response) == 64, codec.count, 40)
        parsed.append(isinstance(question, Question))
        text = question.text.strip() if isinstance(question, Question) else ""
        fact = facts.get(text)
        answerable.append(fact is not None)
        correct.append(fact is not None and bool(rule_score(task, fact.answer, question.reference)))
        repeated.append(text in earlier)
        if fact is not None:
            two_hop.append(len(fact.documents) == 2)
    return {
        "parsed": share(parsed),
        "answerable": share(answerable),
        "correct reference": share(correct),
        "two hops": share(two_hop),
        "repeated": share(repeated),
    }


def check_verifier(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    clusters: Sequence[list[Entity]],
    temperature: float,
) -> float:
    """Percentage of right verdicts; half of the answers are wrong."""
    rng = random.Random(0)
    ids, expected = [], []
    for number, cluster in enumerate(clusters):
        facts = questions(cluster)
        fact = draw_question(rng, facts, TASKS[number % 2]) or facts[0]
        expected.append(number % 4 < 2)
        prediction = fact.answer if expected[-1] else wrong_answer(rng, facts, fact)
        ids.append(codec.prompt(prompts.verifier(fact.text, prediction, fact.answer)))
    verdicts = [parse_verdict(codec.decode(r), len(r) == 4) for r in sample(model, ids, 4, temperature)]
    return share([verdict == right for verdict, right in zip(verdicts, expected, strict=True)])


def report(model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, heldout: Path, clusters: int = 200) -> None:
    """Print how well each role does, greedily and at temperature 0.7."""
    torch.manual_seed(0)
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    rng = random.Random("check")
    unseen = [make_cluster(rng, 8) for _ in range(clusters)]
    for temperature in (0.0, 0.7):
        print(f"temperature {temperature}")
        print("  responder ", check_responder(model, codec, prompts, rows, temperature))
        print("  no context", check_responder(model, codec, prompts, rows, temperature, documents=False))
        print("  questioner", check_questioner(model, codec, prompts, unseen, temperature))
        print("  history   ", check_questioner(model, codec, prompts, unseen, temperature, history=True))
        print("  verifier  ", check_verifier(model, codec, prompts, unseen, temperature), flush=True)


def report_sizes(model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, count: int = 300) -> None:
    """Print the percentage of new questions answered rightly, by the number of documents."""
    print("documents  knows the relation only  greedy  temperature 1  greedy, one document needed  two needed")
    for size in (1, 2, 3, 5, 8):
        rng = random.Random(size)
        asked: list[tuple[list[Entity], Fact]] = []
        while len(asked) < count:
            entities = make_cluster(rng, size)
            if fact := draw_question(rng, questions(entities), TASKS[len(asked) % 2]):
                asked.append((entities, fact))
        ids = [
            codec.prompt(prompts.responder(fact.task, fact.text, [entity.text for entity in entities]))
            for entities, fact in asked
        ]
        hits = {}
        for temperature in (0.0, 1.0):
            torch.manual_seed(0)
            hits[temperature] = [
                parse_answer(fact.task, codec.decode(response), False) == fact.answer
                for (_, fact), response in zip(asked, sample(model, ids, 16, temperature), strict=True)
            ]
        needed = [
            share([hit for hit, (_, fact) in zip(hits[0.0], asked, strict=True) if len(fact.documents) == n])
            for n in (1, 2)
        ]
        baseline = round(100 * sum(relation_baseline(*case) for case in asked) / count, 1)
        print(f"{size:9} {baseline:24} {share(hits[0.0]):7} {share(hits[1.0]):14} {needed[0]:28} {needed[1]:11}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=QUICKSTART / "policy")
    parser.add_argument("--heldout", type=Path, default=QUICKSTART / "heldout.jsonl")
    parser.add_argument("--lessons", type=int, default=LESSONS)
    parser.add_argument("--check-only", action="store_true", help="report on the policy in --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = PromptSet.load("compact")
    if options.check_only:
        model = AutoModelForCausalLM.from_pretrained(options.out)
        report(model, Codec(options.out), prompts, options.heldout)
        report_sizes(model, Codec(options.out), prompts)
        return
    make_tokenizer(options.out)
    codec = Codec(options.out)
    torch.manual_seed(0)
    model = make_model(codec.size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {codec.size} pieces", flush=True)
    train(model, Teacher(codec, prompts, "lessons"), options.lessons)
    save(model, options.out)
    report(model, codec, prompts, options.heldout)


if __name__ == "__main__":
    main()
