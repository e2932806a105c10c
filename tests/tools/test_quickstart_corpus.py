"""The quick start's corpus, prompts, tokenizer and policy."""

from __future__ import annotations

import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import fictional_world as world  # noqa: E402
import make_quickstart_corpus as corpus  # noqa: E402
import make_seed_policy as seed_policy  # noqa: E402
import tiny_policy  # noqa: E402

from spell_megatron.evaluation.questions import load_questions  # noqa: E402
from spell_megatron.selfplay.documents import load_clusters  # noqa: E402
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question, parse_verdict  # noqa: E402
from spell_megatron.selfplay.prompts import PromptSet  # noqa: E402
from spell_megatron.selfplay.scoring import rule_score  # noqa: E402
from spell_megatron.tokenizer import PolicyTokenizer  # noqa: E402

QUICKSTART = ROOT / "examples" / "quickstart"


def read(documents: list[str]) -> dict[tuple[str, str], str]:
    """(relation, entity) -> value, out of plain text; every sentence must be understood."""
    facts: dict[tuple[str, str], str] = {}
    for document in documents:
        for sentence in document.removesuffix(".").split(". "):
            match = re.fullmatch(r"The (\w+) of (\w+) is (\w+)", sentence)
            assert facts.setdefault((match[1], match[2]), match[3]) == match[3]
    return facts


def subject_of(question: str) -> tuple[str, str | None, str]:
    """Relation asked for, the relation on the way to it (None: one hop), entity."""
    match = re.fullmatch(r"What is the (\w+) of (?:the (\w+) of )?(\w+)\?", question)
    return match[1], match[2], match[3]


def answer_to(question: str, documents: list[str]) -> str | None:
    """What the documents say, by a reader that knows the sentences and not the generator."""
    facts = read(documents)
    relation, link, entity = subject_of(question)
    return facts.get((relation, facts.get((link, entity), "") if link else entity))


def test_generated_answers_are_the_only_ones_in_the_text():
    rng = random.Random(3)
    hops = {1: 0, 2: 0}
    for _ in range(100):
        cluster = world.make_cluster(rng, rng.randint(1, 9))
        facts = world.questions(cluster)
        assert len({fact.text for fact in facts}) == len(facts)
        for fact in facts:
            assert answer_to(fact.text, [entity.text for entity in cluster]) == fact.answer
            # The documents named are enough, and of two none can be spared.
            needed = [entity.text for entity in cluster if entity.name in fact.documents]
            assert answer_to(fact.text, needed) == fact.answer
            if len(needed) == 2:
                assert not any(answer_to(fact.text, [document]) for document in needed)
            hops[len(needed)] += 1
    assert min(hops.values()) > 300


def test_heldout_answers_are_right():
    for line in load_questions(QUICKSTART / "heldout.jsonl"):
        assert answer_to(line.question, list(line.documents)) == line.answer


def test_knowing_the_relation_alone_is_not_enough():
    """The README states this figure: 27.9 %."""
    lucky = []
    for line in load_questions(QUICKSTART / "heldout.jsonl"):
        relation = subject_of(line.question)[0]
        stated = [value for (other, _), value in read(list(line.documents)).items() if other == relation]
        lucky.append(stated.count(line.answer) / len(stated))
    assert sum(lucky) / len(lucky) == pytest.approx(0.279, abs=0.0005)


def test_no_wrong_value_passes_the_rule():
    """Values of different kinds too, because a policy may answer with any."""
    values = [value for pool in world.VALUES.values() for value in pool]
    assert len(set(values)) == len(values)
    for reference in values:
        matches = [v for v in values if rule_score(world.GENERAL, v, reference)]
        assert matches == [reference]
    numbers = world.VALUES["number"]
    for reference in numbers:
        assert [n for n in numbers if rule_score(world.MATH, n, reference)] == [reference]


def test_wrong_answers_are_wrong_and_of_the_same_kind():
    rng = random.Random(5)
    facts = world.questions(world.make_cluster(rng, 6))
    for fact in facts * 20:
        wrong = world.wrong_answer(rng, facts, fact)
        assert wrong != fact.answer and wrong in world.VALUES[fact.values]


def test_committed_corpus_is_what_the_script_writes(tmp_path):
    corpus.write_corpus(tmp_path, clusters=2000, heldout=500)
    for name in ("documents.parquet", "heldout.jsonl"):
        if name.endswith("parquet"):  # the bytes depend on the version of pyarrow, the rows do not
            assert pq.read_table(tmp_path / name).equals(pq.read_table(QUICKSTART / name))
        else:
            assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


def test_corpus_loads_and_heldout_documents_are_unseen():
    clusters = load_clusters(QUICKSTART / "documents.parquet")
    assert len(clusters) == 2000
    assert {cluster.source for cluster in clusters} == {"fiction"}
    assert {len(cluster.documents) for cluster in clusters} == {7, 8, 9}
    documents = [document for cluster in clusters for document in cluster.documents]
    assert len(set(documents)) == len(documents)
    assert not any(number == "0" for document in documents for number in re.findall(r"\d+", document))

    questions = load_questions(QUICKSTART / "heldout.jsonl")
    assert len(questions) == 500
    assert not {d for question in questions for d in question.documents} & set(documents)
    tasks = [question.task for question in questions]
    assert tasks.count(world.GENERAL) == tasks.count(world.MATH) == 250
    two_hops = sum(subject_of(question.question)[1] is not None for question in questions)
    assert 100 < two_hops < 300


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> tiny_policy.Codec:
    folder = tmp_path_factory.mktemp("tokenizer")
    seed_policy.make_tokenizer(folder)
    return tiny_policy.Codec(folder)


@pytest.fixture(scope="module")
def teacher(codec) -> seed_policy.Teacher:
    return seed_policy.Teacher(codec, PromptSet.load("compact"), "test")


def test_tokenizer_is_the_committed_one_and_agrees_with_sentencepiece(codec):
    committed = PolicyTokenizer(QUICKSTART / "policy")
    model = sentencepiece.SentencePieceProcessor(model_file=str(QUICKSTART / "policy" / "tokenizer.model"))
    assert committed.vocab_size == codec.size == model.vocab_size()
    prompts = PromptSet.load("compact")
    for question in load_questions(QUICKSTART / "heldout.jsonl", limit=50):
        text = prompts.responder(question.task, question.question, question.documents)
        ids = list(committed.prompt_ids(text))
        assert ids == codec.prompt(text) == [tiny_policy.BOS, *model.encode(text)]
        assert tiny_policy.UNKNOWN not in ids
        assert committed.decode(ids) == " ".join(text.split())
    for text in ("Plain words: 3 + 4 = 7!", "a\n\n b\tc", "<doc>x", '{"question": " x"}', "caf\u00e9"):
        assert list(committed.prompt_ids(text)) == [tiny_policy.BOS, *model.encode(text)]


def test_every_value_is_one_piece(codec):
    assert all(codec.count(value) == 1 for pool in world.VALUES.values() for value in pool)


def test_lessons_satisfy_the_parsers(codec, teacher):
    rng = random.Random(0)
    for fact in world.questions(world.make_cluster(rng, 6)):
        text = codec.decode(codec.output(tiny_policy.question_text(fact.text, fact.answer)))
        question = parse_question(fact.task, text, False, codec.count, 40)
        assert isinstance(question, Question) and question.text.strip() == fact.text
        assert rule_score(fact.task, fact.answer, question.reference)
        answer = codec.decode(codec.output(tiny_policy.answer_text(fact.task, fact.answer)))
        assert rule_score(fact.task, parse_answer(fact.task, answer, False), fact.answer)
    for right in (True, False):
        assert parse_verdict(codec.decode(codec.output(tiny_policy.verdict_text(right))), False) == right


def test_lessons_never_ask_what_the_history_holds(codec, teacher):
    rng, histories = random.Random(1), 0
    for _ in range(200):
        entities, facts = teacher.cluster(rng.randint(2, 4))
        example = teacher.questioner(entities, facts)
        prompt = codec.decode(example.prompt)
        histories += "<example>" in prompt
        asked = json.loads(codec.decode(example.output))["question"].strip()
        assert asked not in prompt
    assert histories > 50


def test_packed_rows_give_the_logits_of_separate_sequences(teacher):
    """Both are float32; the logits are of size 1."""
    torch.manual_seed(0)
    model = tiny_policy.make_model(teacher.codec.size).eval()
    rows = [teacher.row(1), teacher.row(2), teacher.row(5)]
    batch = tiny_policy.pack(rows)
    compared = 0
    with torch.no_grad():
        packed = model(input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask).logits
        for i, examples in enumerate(rows):
            used = batch.weights[i] > 0
            logits, targets = packed[i][used], batch.targets[i][used].tolist()
            start = 0
            for example in examples:
                n = len(example.output)
                alone = model(torch.tensor([example.prompt + example.output])).logits[0]
                expected = alone[len(example.prompt) - 1 : -1]
                assert targets[start : start + n] == example.output
                torch.testing.assert_close(logits[start : start + n], expected, atol=2e-5, rtol=0)
                start += n
            assert start == len(targets)
            compared += start
    assert compared > 200
    assert (batch.keys > 0).sum() == sum(e.role != "cloze" for row in rows for e in row)


def test_committed_policy_follows_its_formats():
    """Format only; `make_seed_policy.py --check-only` measures what it can do."""
    folder = QUICKSTART / "policy"
    codec, prompts = tiny_policy.Codec(folder), PromptSet.load("compact")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == codec.size
    assert codec.policy.eos_ids == {tiny_policy.EOS} == {model.generation_config.eos_token_id}
    rows = load_questions(QUICKSTART / "heldout.jsonl", limit=40)
    ids = [codec.prompt(prompts.responder(row.task, row.question, row.documents)) for row in rows]
    predictions = [
        parse_answer(row.task, codec.decode(response), False)
        for row, response in zip(rows, tiny_policy.sample(model, ids, 16, 0.0), strict=True)
    ]
    hits = sum(rule_score(row.task, prediction, row.answer) for row, prediction in zip(rows, predictions, strict=True))
    assert sum(prediction is not None for prediction in predictions) >= 36
    assert 12 <= hits <= 36  # reads, and has something to learn
    ids = [codec.prompt(prompts.questioner(row.task, row.documents[:3], [], None)) for row in rows]
    asked = [
        parse_question(row.task, codec.decode(response), False, codec.count, 40)
        for row, response in zip(rows, tiny_policy.sample(model, ids, 64, 0.0), strict=True)
    ]
    assert sum(isinstance(question, Question) for question in asked) >= 36


def test_what_the_policy_can_do_is_printed(monkeypatch, capsys, tmp_path):
    """By the command of the quick start's page, over fewer questions and clusters."""
    few = tmp_path / "few.jsonl"
    few.write_text(
        "\n".join((QUICKSTART / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:6]), encoding="utf-8"
    )
    for name, less in (("report", {"clusters": 4}), ("report_sizes", {"count": 6})):
        monkeypatch.setattr(seed_policy, name, partial(getattr(seed_policy, name), **less))
    monkeypatch.setattr(sys, "argv", ["make_seed_policy.py", "--check-only", "--heldout", str(few)])
    seed_policy.main()
    lines = capsys.readouterr().out.splitlines()
    roles = ["responder", "no context", "questioner", "history", "verifier"]
    starts = ["temperature 0.0", *roles, "temperature 0.7", *roles, "documents", "1 ", "2 ", "3 ", "5 ", "8 "]
    assert [line for line, start in zip(lines, starts, strict=True) if not line.strip().startswith(start)] == []


def test_committed_files_are_small():
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*") if path.is_file()) < 20e6
