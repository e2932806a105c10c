"""The rich world: its documents, questions and oracle, its corpus, tokenizer and policy."""

from __future__ import annotations

import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_rich_corpus as corpus  # noqa: E402
import make_rich_policy as rich_policy  # noqa: E402
import rich_questions as asking  # noqa: E402
import rich_world as world  # noqa: E402
from tiny_policy import answer_text, question_text, sample  # noqa: E402

from spell_megatron.config.reading import load_config  # noqa: E402
from spell_megatron.evaluation.questions import load_questions  # noqa: E402
from spell_megatron.selfplay.documents import load_clusters  # noqa: E402
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question, parse_verdict  # noqa: E402
from spell_megatron.selfplay.prompts import PromptSet  # noqa: E402
from spell_megatron.selfplay.scoring import rule_score  # noqa: E402
from spell_megatron.selfplay.texts import normalize_text, words  # noqa: E402

RICH = ROOT / "examples" / "evidence" / "rich"
FIRST = {form: first for pairs in world.VALUES.values() for first, second in pairs.items() for form in (first, second)}
VERBS = {
    of.sentence.removesuffix(".").format(entity=r"(?P<e>\S+)", value=r"(?P<v>\S+)"): relation
    for relations in world.RELATIONS.values()
    for relation, of in relations.items()
}


def read(documents: list[str]) -> dict[tuple[str, str], str]:
    """(relation, entity) -> value, out of plain text; every sentence must be understood."""
    facts: dict[tuple[str, str], str] = {}
    for text in filter(None, " ".join(documents).removesuffix(".").split(". ")):
        plain = re.fullmatch(r"The (\w+) of (\S+) is (\S+)", text)
        verbs = [(relation, match) for verb, relation in VERBS.items() if (match := re.fullmatch(verb, text))]
        assert plain or len(verbs) == 1, text
        relation, entity, value = plain.groups() if plain else (verbs[0][0], verbs[0][1]["e"], verbs[0][1]["v"])
        assert facts.setdefault((relation, FIRST[entity]), FIRST[value]) == FIRST[value]
    return facts


def chain(text: str, facts: dict) -> str:
    """What "the R of the R of E" or "E's R's R" is, by a reader who does not know the generator."""
    *relations, entity = text.replace("the ", "").split(" of ")
    if "'s " in text:
        entity, *steps = text.split("'s ")
        relations = steps[::-1]
    value = FIRST[entity]
    for relation in reversed(relations):
        value = facts[relation, value]
    return value


def answer_to(question: str, documents: list[str]) -> str:
    """What the documents say. KeyError: they do not."""
    facts, asked = read(documents), question.removesuffix("?")
    if asked.startswith("How often"):
        value, relation = re.fullmatch(r"How often is (\S+) the (\w+)", asked).groups()
        return str(sum(r == relation and v == FIRST[value] for (r, _), v in facts.items()))
    if asked.startswith("Which is larger, "):
        return str(max(int(chain(side, facts)) for side in asked.removeprefix("Which is larger, ").split(" or ")))
    asked = asked.removeprefix("What is ")
    if " plus " in asked:
        return str(sum(int(chain(side, facts)) for side in asked.split(" plus ")))
    if " minus " in asked:
        first, second = (int(chain(side, facts)) for side in asked.split(" minus "))
        return str(first - second)
    return chain(asked, facts)


def drawn(count: int, seed: int = 0):
    """(entities, question) of clusters of all sizes, both tasks in turn."""
    rng = random.Random(seed)
    for number in range(count):
        entities = world.make_cluster(rng, rng.randint(1, 8))
        task = (asking.GENERAL, asking.MATH)[number % 2]
        if question := asking.draw_question(rng, asking.chains(entities), task):
            yield entities, question


def test_questions_are_answered_by_the_documents_and_need_those_that_they_name():
    kinds: dict[str, int] = {}
    for entities, question in drawn(600):
        assert answer_to(question.text, [e.text for e in entities]) == question.answers[0]
        needed = [e for e in entities if e.name in question.documents]
        assert answer_to(question.text, [e.text for e in needed]) == question.answers[0]
        kinds[question.operation] = kinds.get(question.operation, 0) + 1
        if question.operation == "value":
            depth = f"{len(question.documents)} documents"
            kinds[depth] = kinds.get(depth, 0) + 1
            for left_out in needed:
                with pytest.raises(KeyError):
                    answer_to(question.text, [e.text for e in needed if e is not left_out])
    assert set(kinds) >= {*asking.OPERATIONS, "1 documents", "2 documents", "3 documents", "4 documents"}
    assert min(kinds.values()) >= 3


def test_oracle_reads_questions_as_a_reader_does():
    for entities, question in drawn(600, seed=1):
        answers = asking.Oracle(entities).answerable(question.text)
        assert set(question.answers) <= answers
        assert {world.value_of(answer) or answer for answer in answers} == {question.answers[0]}


def test_oracle_answers_only_what_the_documents_say():
    ada, bo, town = list(world.VALUES["person"])[:2] + list(world.VALUES["town"])[:1]
    facts = {"friend": bo, "wage": "7"}, {"friend": ada, "home": town, "wage": "12"}
    oracle = asking.Oracle([world.Entity(n, "person", f, "") for n, f in zip((ada, bo), facts, strict=True)])
    assert oracle.answerable(f"What is {ada}'s friend's home?") == set(world.forms(town))
    assert oracle.answerable(f" What is the home of the friend of the friend of the friend of {ada}? ")
    assert oracle.answerable(f"What is the wage of {world.forms(bo)[1]} minus the wage of {ada}?") == {"5"}
    assert oracle.answerable(f"What is the wage of {ada} plus the wage of the friend of {ada}?") == {"19"}
    assert oracle.answerable(f"Which is larger, the wage of {ada} or the wage of {bo}?") == {"12"}
    assert oracle.answerable(f"How often is {world.forms(town)[1]} the home?") == {"1"}
    for nothing in (
        f"What is the home of {ada}?",
        f"What is the mayor of the home of {bo}?",
        "What is the home of Nobody?",
        f"What is the wage of {ada} plus the home of {bo}?",
        f"What is the wage of {ada} or the wage of {bo}?",
        f"Which is larger, the wage of {ada} plus the wage of {bo}?",
        f"How often is {ada} the mayor?",
        f"What is {ada}?",
        "Why?",
        "",
    ):
        assert oracle.answerable(nothing) is None, nothing


def test_a_name_passes_the_rule_for_no_other_name():
    """Not even for the other one of the same value. All are one word, so it is enough that the words differ."""
    names = [form for pairs in world.VALUES.values() for pair in pairs.items() for form in pair]
    assert len({normalize_text(name) for name in names}) == len(names)
    assert all(len(words(name).split()) == 1 for name in names)
    for pairs in world.VALUES.values():
        for first, second in pairs.items():
            assert rule_score(asking.GENERAL, first, first) and not rule_score(asking.GENERAL, first, second)
    numbers = [str(number) for number in range(1, 41)]
    for reference in numbers:
        assert [n for n in numbers if rule_score(asking.MATH, n, reference)] == [reference]


def test_wrong_answers_are_wrong_and_of_the_same_kind():
    rng = random.Random(5)
    for entities, question in drawn(200, seed=2):
        wrong = asking.wrong_answer(rng, asking.chains(entities), question)
        assert wrong not in question.answers
        assert world.value_of(wrong) in world.VALUES[question.kind]


def test_committed_corpus_is_what_the_script_writes(tmp_path):
    corpus.write_corpus(tmp_path, clusters=300, heldout=500)
    assert pq.read_table(tmp_path / "documents.parquet").equals(pq.read_table(RICH / "documents.parquet"))
    assert (tmp_path / "heldout.jsonl").read_bytes() == (RICH / "heldout.jsonl").read_bytes()


def test_heldout_questions_are_right_and_their_documents_unseen():
    clusters = load_clusters(RICH / "documents.parquet")
    documents = {document for cluster in clusters for document in cluster.documents}
    assert {len(cluster.documents) for cluster in clusters} == set(corpus.SIZES)
    questions = load_questions(RICH / "heldout.jsonl")
    assert len(questions) == 500
    for question in questions:
        assert answer_to(question.question, list(question.documents)) == question.answer
        assert not documents & set(question.documents)
        assert (question.answer, *question.aliases) == (
            (question.answer,) if question.task == asking.MATH else world.forms(question.answer)
        )
    assert {question.task for question in questions} == {asking.GENERAL, asking.MATH}


def test_training_questions_are_over_the_training_clusters():
    rows = corpus.training_questions(40)
    for row, cluster in zip(rows, corpus.training_clusters(40), strict=True):
        assert row["documents"] == [entity.text for entity in cluster]
        assert answer_to(row["question"], row["documents"]) == row["answer"]


@pytest.fixture(scope="module")
def codec() -> rich_policy.Codec:
    return rich_policy.Codec(RICH / "policy")


def test_tokenizer_is_the_committed_one_and_knows_every_word(codec, tmp_path):
    rich_policy.make_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (RICH / "policy" / "tokenizer.json").read_bytes()
    assert all(codec.count(word) == 1 for word in rich_policy.words_of_the_world())
    for entities, question in drawn(40, seed=3):
        text = PromptSet.load("compact").responder(question.task, question.text, [e.text for e in entities])
        assert codec.decode(codec.prompt(text)) == " ".join(text.split())
        assert codec.count(question.text) <= len(re.findall(r"\w+|'s|[?,]", question.text)) + 1


def test_lessons_satisfy_the_parsers(codec):
    for _, question in drawn(100, seed=4):
        for said in question.answers:
            text = codec.decode(codec.output(question_text(question.text, said)))
            parsed = parse_question(question.task, text, False, codec.count, 40)
            assert isinstance(parsed, Question) and parsed.text == question.text and parsed.reference == said
            answer = codec.decode(codec.output(answer_text(question.task, said)))
            assert parse_answer(question.task, answer, False) == said


def test_lessons_never_ask_what_the_history_holds(codec):
    rng, teacher, histories = random.Random(1), rich_policy.Teacher(codec, PromptSet.load("compact")), 0
    for entities, _ in drawn(60, seed=6):
        every = asking.chains(entities)
        lesson = teacher.questioner(rng, [entity.text for entity in entities], every)
        earlier = re.findall(r"<example> \d+ (.*?) <answer>", codec.decode(lesson.prompt))
        histories += bool(earlier)
        asked = parse_question(asking.GENERAL, codec.decode(lesson.output[:-1]), False, codec.count, 40)
        assert asked.text not in earlier
    assert histories > 15


def test_judged_lessons_are_right(codec):
    rng = random.Random(2)
    for entities, question in drawn(200, seed=7):
        for right in (True, False):
            prediction, reference = rich_policy.judged(rng, asking.chains(entities), question, right)
            assert reference in question.answers
            assert (prediction in question.answers) == right


def test_policy_reads_asks_and_judges(codec):
    """The committed policy, in the program's own sampling: well enough to be trained, and not too well."""
    model, prompts = AutoModelForCausalLM.from_pretrained(RICH / "policy"), PromptSet.load("compact")
    rows = [json.loads(line) for line in (RICH / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    right = rich_policy.check_responder(model, codec, prompts, rows, 0.0)["all"]
    assert 15 <= right <= 70
    ids = [codec.prompt(prompts.questioner(row["task"], row["documents"][:3], [], None)) for row in rows]
    asked = [
        parse_question(row["task"], codec.decode(response), False, codec.count, 40)
        for row, response in zip(rows, sample(model, ids, 48, 0.0), strict=True)
    ]
    assert sum(isinstance(question, Question) for question in asked) >= 36
    ids = [codec.prompt(prompts.verifier(row["question"], row["answer"], row["answer"])) for row in rows]
    votes = [parse_verdict(codec.decode(response), False) for response in sample(model, ids, 4, 0.0)]
    assert votes.count(1) >= 30


def test_configuration_is_valid_and_files_are_small():
    config = load_config([ROOT / "examples" / "evidence" / "rich.yaml"], [])
    assert all((ROOT / path).exists() for path in (config.model.path, config.data.documents))
    assert sum(path.stat().st_size for path in RICH.rglob("*") if path.is_file()) < 8e6


def test_what_the_policy_can_do_is_printed(monkeypatch, capsys):
    """By the command of the world's page, over fewer questions and clusters."""
    monkeypatch.setattr(rich_policy, "report", partial(rich_policy.report, clusters=4))
    monkeypatch.setattr(sys, "argv", ["make_rich_policy.py", "--check-only", "--limit", "6"])
    rich_policy.main()
    lines = capsys.readouterr().out.splitlines()
    starts = [f"questioner, {shown} documents {{" for shown in (1, 2, 3, 5)]
    starts += ["verifier {", "responder, temperature 1 {", "responder, greedy        {"]
    assert [line for line, start in zip(lines, starts, strict=True) if not line.startswith(start)] == []
