"""Make the policy of the rich world: a tokenizer and a tiny language model that asks, answers and judges.

    python tools/make_rich_policy.py [--out examples/evidence/rich/policy] [--check-only]

It starts from the quick start's policy, which can copy and read: layers and known words are taken over, new words
begin near words of the quick start, and one more layer is added. Then it is taught the two names of things, new
sentences, longer questions and arithmetic, mostly on one to three documents: in READING updates all roles alike, in
ASKING updates after them, whose learning rate falls, mostly to ask short questions. The responder answers in either
name; the verifier learns which names mean the same. None is taught to the end. One thread and fixed seeds. Killed and
called again, it goes on where it was. At the end it prints how well each role does.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich_questions import (
    GENERAL,
    LENGTHS,
    MATH,
    OPERATIONS,
    Chain,
    Oracle,
    Question,
    chains,
    draw_question,
    wrong_answer,
)
from rich_world import RELATIONS, VALUES, Entity, make_cluster, name
from tiny_policy import (
    JOINTS,
    LEARNING_RATE,
    ROLES,
    Codec,
    Example,
    answer_text,
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.parsing import Question as ParsedQuestion
from spell_megatron.selfplay.parsing import parse_answer, parse_question, parse_verdict
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.scoring import rule_score

ROOT = Path(__file__).parents[1]
RICH, QUICKSTART = ROOT / "examples" / "evidence" / "rich", ROOT / "examples" / "quickstart"
TASKS = (GENERAL, MATH)
LAYERS = 5
READING, ASKING = 550, 200
FIRST = 50
"""The first updates of READING are on single documents."""
SIZES = {1: 0.25, 2: 0.3, 3: 0.25, 4: 0.04, 5: 0.04, 6: 0.04, 7: 0.04, 8: 0.04}
SIZES_ASKING = {1: 0.3, 2: 0.45, 3: 0.1, 4: 0.03, 5: 0.03, 6: 0.03, 7: 0.03, 8: 0.03}
"""How often a lesson has how many documents."""
SHORT = (0.65, 0.27, 0.05, 0.03)
PLAIN = {"value": 0.8, "larger": 0.05, "difference": 0.05, "sum": 0.05, "count": 0.05}
"""How often the questions to ask are of which kind in the updates of ASKING, as `rich_questions.LENGTHS` and
OPERATIONS."""
UNFINISHED = "unfinished.pt"
WORDS = (
    "Empty word number choice another The Therefore, the correct answer is 1 What How often of Which larger, or plus "
    "minus"
)


# Tokenizer and start.


def words_of_the_world() -> list[str]:
    """Every word that the roles read or write, with the comma that follows it, if one can."""
    relations = [(relation, of.sentence) for kind in RELATIONS.values() for relation, of in kind.items()]
    verbs = [word for _, sentence in relations for word in re.findall(r"(?<!\{)\b[a-z]+\b(?!\})", sentence)]
    names = [form for pairs in VALUES.values() for pair in pairs.items() for form in pair]
    numbers = [str(number) for number in range(1, 41)]
    return sorted({*WORDS.split(), *(relation for relation, _ in relations), *verbs, *names, *numbers})


def make_tokenizer(folder: Path) -> None:
    """Write the tokenizer, in which every word of the world is one piece, and the genitive's s another."""
    write_tokenizer(folder, words_of_the_world(), (*JOINTS, "'s"))


@torch.no_grad()
def grown(codec: Codec, tokenizer: Path, source: Path) -> Qwen3ForCausalLM:
    """The policy of `source` with another vocabulary and one more layer, which changes nothing yet.

    Words that `source` does not know begin at a random known word, with noise.
    """
    old, model = AutoModelForCausalLM.from_pretrained(source), make_model(codec.size, LAYERS)
    state = {key: value for key, value in old.state_dict().items() if key.startswith(("model.layers", "model.norm"))}
    model.load_state_dict(state, strict=False)
    for layer in model.model.layers[old.config.num_hidden_layers :]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    known = AutoTokenizer.from_pretrained(source).get_vocab()
    rows, rng = old.model.embed_tokens.weight, random.Random("new words")
    old_words = [i for piece, i in sorted(known.items()) if re.fullmatch("▁\\w+", piece)]
    torch.manual_seed(0)
    for piece, i in sorted(AutoTokenizer.from_pretrained(tokenizer).get_vocab().items()):
        if piece in known:
            row = rows[known[piece]]
        else:
            near = rows[rng.choice(old_words)]
            row = near + 0.5 * near.std() * torch.randn(near.shape)
        model.model.embed_tokens.weight[i] = row
    return model


# Lessons.


def said(rng: random.Random, question: Question) -> str:
    """The answer in one of its names; amounts are answered in digits."""
    return question.answers[0] if question.task == MATH else name(rng, question.answers[0])


class Teacher:
    """Draws clusters and examples. What it teaches is right."""

    def __init__(self, codec: Codec, prompts: PromptSet) -> None:
        self.codec, self.prompts = codec, prompts

    def responder(self, rng: random.Random, texts: Sequence[str], every: Sequence[Chain]) -> Example:
        question = drawn(rng, every)
        prompt = self.prompts.responder(question.task, question.text, texts)
        answer = said(rng, question)
        return example(self.codec, "responder", prompt, answer_text(question.task, answer), answer, 0.1)

    def questioner(
        self, rng: random.Random, texts: Sequence[str], every: Sequence[Chain], short: bool = False
    ) -> Example:
        """Half of the prompts list earlier questions of the same task; the new one differs from them."""
        kinds = (SHORT, PLAIN) if short else (LENGTHS, OPERATIONS)
        question = drawn(rng, every, *kinds)
        count = rng.choice((0, 0, 0, 1, 2, 3))
        others = [draw_question(rng, every, question.task, *kinds) for _ in range(count)]
        shown = [Entry((), other.text, said(rng, other)) for other in others if other and other.text != question.text]
        prompt = self.prompts.questioner(question.task, texts, shown, None)
        answer = said(rng, question)
        return example(self.codec, "questioner", prompt, question_text(question.text, answer), answer, 1.0)

    def verifier(self, rng: random.Random, every: Sequence[Chain]) -> Example:
        """Half of the answers are right; of those that names express, half are in another name than the reference."""
        question, right = drawn(rng, every), rng.random() < 0.5
        prompt = self.prompts.verifier(question.text, *judged(rng, every, question, right))
        return example(self.codec, "verifier", prompt, verdict_text(right), verdict_text(right), 0.1)

    def cloze(self, rng: random.Random, texts: Sequence[str], entities: Sequence[Entity]) -> Example:
        """A sentence of the documents again, to be completed."""
        entity = rng.choice(entities)
        words = rng.choice(entity.text.removesuffix(".").split(". ")).split()
        documents, _, _ = self.prompts.responder(MATH, "", texts).partition("<ask>")
        last = words[-1]
        return example(self.codec, "cloze", documents + " ".join(words[:-1]), f"{last}.", last, 0.1)

    def row(self, rng: random.Random, size: int, asking: bool) -> list[Example]:
        """Examples over one cluster: all roles over few documents, responder and verifier over more."""
        while True:
            entities = make_cluster(rng, size)
            every = chains(entities)
            if {chain.kind == "amount" for chain in every} == {True, False}:
                break
        texts = [entity.text for entity in entities]
        examples = [self.responder(rng, texts, every) for _ in range(4 if asking else 7)]
        examples += [self.verifier(rng, every) for _ in range(1 if asking else 3)]
        if size <= 3:
            examples += [self.questioner(rng, texts, every, asking) for _ in range(10 if asking else 4)]
            examples += [self.cloze(rng, texts, entities) for _ in range(1 if asking else 3)]
        return examples


def drawn(
    rng: random.Random,
    every: Sequence[Chain],
    lengths: Sequence[float] = LENGTHS,
    operations: Mapping[str, float] = OPERATIONS,
) -> Question:
    question = draw_question(rng, every, rng.choice(TASKS), lengths, operations)
    assert question is not None
    return question


def judged(rng: random.Random, every: Sequence[Chain], question: Question, right: bool) -> tuple[str, str]:
    """A right or a wrong answer and a reference, each in either name."""
    reference = rng.choice(question.answers)
    return rng.choice(question.answers) if right else wrong_answer(rng, every, question), reference


def train(model: Qwen3ForCausalLM, teacher: Teacher, reading: int, asking: int, unfinished: Path) -> None:
    """Teach `reading` updates, then `asking` more. Training that was stopped goes on from the state in `unfinished`."""
    optimizer, first = make_optimizer(model), 0
    if unfinished.exists():
        state = torch.load(unfinished, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    codec, accuracy, start, tokens = teacher.codec, dict.fromkeys(ROLES[1:-1], 0.0), time.process_time(), 0
    meaning = torch.arange(codec.size)  # names that mean the same are equally right
    for pairs in VALUES.values():
        for one, two in pairs.items():
            meaning[codec.output(two)[0]] = codec.output(one)[0]
    for step in range(first, reading + asking):
        rng, sizes = random.Random(f"lesson {step}"), SIZES if step < reading else SIZES_ASKING
        size = rng.choices(tuple(sizes), tuple(sizes.values()))[0] if step >= FIRST else 1
        left = (reading + asking - step) / asking if step >= reading else 1.0
        set_learning_rate(optimizer, LEARNING_RATE * min((step + 1) / 50, max(left, 0.05)))
        batch = pack([teacher.row(rng, size, step >= reading) for _ in range(max(3, int(11 / (size + 1) ** 0.5)))])
        loss, chosen, targets, keys = learn(model, optimizer, batch)
        right = (meaning[chosen] == meaning[targets]).float()
        for i, role in enumerate(ROLES):
            if role in accuracy and size <= 3 and (keys == i).any():
                accuracy[role] += 0.05 * (right[keys == i].mean().item() - accuracy[role])
        tokens += batch.tokens.numel()
        if (step + 1) % 50 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, unfinished)
            shares = " ".join(f"{role} {value:.2f}" for role, value in accuracy.items())
            seconds = time.process_time() - start
            print(
                f"step {step + 1} {seconds:.0f} s of CPU {tokens / seconds:.0f} tokens/s loss {loss:.3f} {shares}",
                flush=True,
            )


# Checks.


def check_responder(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    rows: Sequence[dict],
    temperature: float,
    samples: int = 1,
) -> dict[str, float]:
    """Percentage right, by task and as a whole: with all names of the answer, and (`rule`) with its first one only."""
    ids = [codec.prompt(prompts.responder(row["task"], row["question"], row["documents"])) for row in rows] * samples
    scores: dict[str, list[bool]] = {}
    tries: dict[str, int] = {}
    for row, response in zip(list(rows) * samples, sample(model, ids, 16, temperature), strict=True):
        prediction = parse_answer(row["task"], codec.decode(response), len(response) == 16)
        right = any(rule_score(row["task"], prediction, answer) for answer in (row["answer"], *row["aliases"]))
        tries[row["id"]] = tries.get(row["id"], 0) + right
        for group in (row["task"], row["operation"], f"{len(row['needed'])} needed", "all"):
            scores.setdefault(group, []).append(right)
        scores.setdefault("rule", []).append(bool(rule_score(row["task"], prediction, row["answer"])))
    best = {f"pass@{samples}": share([count > 0 for count in tries.values()])} if samples > 1 else {}
    return {group: share(hits) for group, hits in sorted(scores.items())} | best


def check_questioner(
    model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, clusters: Sequence[list[Entity]], shown: int
) -> dict[str, float]:
    """Percentage of questions that parse, that the cluster's documents answer, and whose reference is right."""
    ids = [
        codec.prompt(prompts.questioner(TASKS[number % 2], [e.text for e in cluster[:shown]], [], None))
        for number, cluster in enumerate(clusters)
    ]
    parsed, answerable, right = [], [], []
    for number, response in enumerate(sample(model, ids, 48, 1.0)):
        task = TASKS[number % 2]
        question = parse_question(task, codec.decode(response), len(response) == 48, codec.count, 40)
        parsed.append(isinstance(question, ParsedQuestion))
        answers = Oracle(clusters[number]).answerable(question.text) if isinstance(question, ParsedQuestion) else None
        answerable.append(bool(answers))
        right.append(bool(answers) and question.reference in answers)
    usable = [hit for hit, usable in zip(right, parsed, strict=True) if usable]
    return {
        "parsed": share(parsed),
        "answerable": share(answerable),
        "right": share(right),
        "right of parsed": share(usable),
    }


def check_verifier(
    model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, clusters: Sequence[list[Entity]]
) -> dict[str, float]:
    """Percentage of verdicts YES at temperature 1, by what is judged; the share that is right on questions of texts."""
    rng, cases = random.Random(0), []
    for cluster in clusters:
        every = chains(cluster)
        question = draw_question(rng, every, GENERAL)
        if question:
            first, second = rng.sample(question.answers, 2)
            wrong = wrong_answer(rng, every, question)
            cases += [("same", question, first, first), ("synonym", question, first, second)]
            cases += [("wrong", question, wrong, first)]
    ids = [codec.prompt(prompts.verifier(question.text, p, r)) for _, question, p, r in cases]
    votes: dict[str, list[bool]] = {}
    for (what, *_), response in zip(cases, sample(model, ids, 4, 1.0), strict=True):
        votes.setdefault(what, []).append(parse_verdict(codec.decode(response), len(response) == 4) == 1)
    yes = {what: share(of) for what, of in votes.items()}
    return {f"YES on {what}": of for what, of in yes.items()} | {
        "right": (yes["same"] + yes["synonym"]) / 4 + (100 - yes["wrong"]) / 2
    }


def report(
    model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, rows: Sequence[dict], clusters: int = 150
) -> None:
    """Print how well each role does."""
    torch.manual_seed(0)
    rng = random.Random("check")
    unseen = [make_cluster(rng, rng.randint(4, 8)) for _ in range(clusters)]
    for shown in (1, 2, 3, 5):
        print(f"questioner, {shown} documents", check_questioner(model, codec, prompts, unseen, shown), flush=True)
    print("verifier", check_verifier(model, codec, prompts, unseen), flush=True)
    print("responder, temperature 1", check_responder(model, codec, prompts, rows, 1.0, 8), flush=True)
    print("responder, greedy       ", check_responder(model, codec, prompts, rows, 0.0), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RICH / "policy")
    parser.add_argument("--heldout", type=Path, default=RICH / "heldout.jsonl")
    parser.add_argument("--limit", type=int, default=500, help="held-out questions that are asked")
    parser.add_argument("--reading", type=int, default=READING)
    parser.add_argument("--asking", type=int, default=ASKING)
    parser.add_argument("--check-only", action="store_true", help="report on the policy in --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = PromptSet.load("compact")
    rows = [json.loads(line) for line in options.heldout.read_text(encoding="utf-8").splitlines()][: options.limit]
    if options.check_only:
        report(AutoModelForCausalLM.from_pretrained(options.out), Codec(options.out), prompts, rows)
        return
    make_tokenizer(options.out)
    codec = Codec(options.out)
    model = grown(codec, options.out, QUICKSTART / "policy")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {codec.size} pieces", flush=True)
    train(model, Teacher(codec, prompts), options.reading, options.asking, options.out / UNFINISHED)
    save(model, options.out)
    (options.out / UNFINISHED).unlink(missing_ok=True)
    report(model, codec, prompts, rows)


if __name__ == "__main__":
    main()
