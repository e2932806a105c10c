"""examples/evidence/run.py: its arms are valid runs, and its comparison is right."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from spell_megatron.config.reading import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("evidence_run", ROOT / "examples" / "evidence" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_are_valid_runs_that_differ(evidence):
    configs = [load_config(evidence.CONFIG, arm) for arm in evidence.ARMS.values()]
    assert len({config.model_dump_json() for config in configs}) == len(configs)


def test_questions_of_the_baseline_are_over_the_training_documents(evidence):
    rows = evidence.training_questions(20)
    assert [row["task"] for row in rows[:2]] == ["doc_general_qa", "docmath_qa"]
    for row in rows:
        assert any(row["answer"] in text for text in row["documents"])
    held_out = {text for line in evidence.HELDOUT.open() for text in json.loads(line)["documents"]}
    assert not held_out & {text for row in rows for text in row["documents"]}


def answer(folder: Path, evidence, right: dict[int, int]) -> None:
    """Writes samples of every held-out question, of which `right[n]` are right for the n-th question, else none."""
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("{}")
    with (folder / "samples.jsonl").open("w") as file:
        for number, question in enumerate(map(json.loads, evidence.HELDOUT.open())):
            for sample in range(evidence.SAMPLES):
                value = question["answer"] if sample < right.get(number, 0) else "nothing"
                words = "the answer is" if question["task"] == "docmath_qa" else "The correct answer is"
                file.write(json.dumps({"id": question["id"], "text": f"{words} {value}", "cut": False}) + "\n")


def test_summary(evidence, tmp_path):
    """Of 500 questions the start answers 100 with 4 of 8 samples; the recipe 200, one seed with 8, the other with 4."""
    for seed in (0, 1):
        answer(tmp_path / f"start-{seed}-answers", evidence, dict.fromkeys(range(100), 4))
        answer(tmp_path / f"recipe-{seed}-answers", evidence, dict.fromkeys(range(200), 8 - 4 * seed))
        run = tmp_path / f"recipe-{seed}"
        run.mkdir()
        rows = [{"step": 0, "validation/pass@1": 0.1}, {"step": 1}, {"step": 4, "validation/pass@1": 0.2 + 0.2 * seed}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer(tmp_path / "rlvr-0-answers", evidence, {})  # its other seed is missing, so it is left out
    results = evidence.summary(tmp_path, range(2))
    assert set(results) == {"start", "recipe"}
    assert results["start"]["pass@1"]["mean"] == pytest.approx(0.1) and results["start"]["pass@8"]["mean"] == 0.2
    recipe = results["recipe"]
    assert recipe["pass@1"]["seeds"] == pytest.approx([0.4, 0.2])
    assert recipe["pass@1"]["over start"]["mean"] == pytest.approx(0.2)
    assert recipe["pass@8"]["mean"] == recipe["pass@8"]["over start"]["mean"] * 2 == 0.4
    assert recipe["curve"] == [(0, pytest.approx(0.1)), (4, pytest.approx(0.3))]
    assert recipe["pass@1"]["low"] < 0.2 + 0.05 and recipe["pass@1"]["high"] > 0.4 - 0.05  # seeds are drawn, too
    assert results["start"]["pass@1"]["over recipe"]["mean"] == pytest.approx(-0.2)
    table = evidence.as_table(results)
    assert "| recipe | 30.0 (" in table and "| 40.0, 20.0 | +20.0 (" in table


def test_references_are_held_against_the_documents(evidence):
    """Every fact of one hop stands in a document of its cluster, and questions of two hops are made of two such."""
    answers = evidence.answers_in_documents()
    table = evidence.pq.read_table(evidence.DOCUMENTS).slice(0, evidence.CLUSTERS).to_pylist()
    assert list(answers) == [row["cluster_id"] for row in table]
    twice = 0
    for row in table[:20]:
        text, known = " ".join(row["documents"]), answers[row["cluster_id"]]
        for question, answer in known.items():
            relation, *middle, entity = question.removeprefix("What is the ").removesuffix("?").split(" of ")
            if middle:
                entity = known[f"What is {middle[0]} of {entity}?"]
                twice += 1
            assert f"The {relation} of {entity} is {answer}." in text
        assert len(known) > len(row["documents"])
    assert twice > 20


def test_what_the_roles_did(evidence, tmp_path):
    def question(reward: float, reference: str | None, outcome: str = "mixed") -> dict:
        prediction = reference and "What is the head of Amco?"
        row = {"role": "questioner", "reward": reward, "prediction": prediction, "reference": reference}
        return row | {"cluster_id": "a", "outcome": outcome}

    def vote(rule: int, verdict: int) -> dict:
        return {"role": "verifier", "rule_score": rule, "verdict": verdict}

    first = [
        question(0.7, "Bo"),
        question(0.1, "Cy"),
        question(0.0, "Bo"),
        question(-0.5, "Cy", "unconfirmed"),
        question(-1.0, None, "bad_format"),
        *(vote(1, 1), vote(1, 0), vote(0, 0), vote(0, -1)),
        {"role": "responder"},
    ]
    (tmp_path / "rollouts").mkdir()
    for step, rows in enumerate((first, [vote(0, 1)]), start=1):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines)
    answers = {"a": {"What is the head of Amco?": "Bo"}}
    assert evidence.roles([tmp_path], answers, [1]) == {
        "questions with mixed answers": 2 / 5,
        "questions that the gate refuses": 1 / 5,
        "references that the documents give": 2 / 4,
        "... of questions with mixed answers": 1 / 2,
        "votes YES on answers right by the rule": 1 / 2,
        "votes YES on answers wrong by the rule": 0,
    }
    assert evidence.roles([tmp_path], answers, [1, 2])["votes YES on answers wrong by the rule"] == 1 / 2
    assert evidence.roles([tmp_path], answers, [2]) == {"votes YES on answers wrong by the rule": 1}


def test_interval_is_that_of_a_mean(evidence):
    """Against the normal approximation, for many questions and one seed."""
    values = np.random.default_rng(1).random((1, 2000))
    low, high = evidence.interval(values)
    error = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - error, abs=error / 5)
    assert high == pytest.approx(values.mean() + error, abs=error / 5)
