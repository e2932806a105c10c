"""examples/evidence/run.py: its arms are valid runs, and its comparison is right."""

import importlib.util
import json
import re
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
    for world in evidence.WORLDS.values():
        configs = [load_config(world.config, arm) for arm in evidence.ARMS.values()]
        assert len({config.model_dump_json() for config in configs}) == len(configs)


@pytest.fixture(scope="module")
def quickstart(evidence):
    return evidence.WORLDS["quickstart"]


@pytest.fixture(scope="module")
def rich(evidence):
    return evidence.WORLDS["rich"]


@pytest.mark.parametrize("world", ["quickstart", "rich"])
def test_questions_of_the_baseline_are_over_the_training_documents(evidence, world):
    world = evidence.WORLDS[world]
    rows = world.training_questions(20)
    assert [row["task"] for row in rows[:2]] == ["doc_general_qa", "docmath_qa"]
    for row, oracle in zip(rows, world.answers().values(), strict=False):
        assert row["answer"] in oracle(row["question"])
    held_out = {text for row in evidence.rows_of(world.heldout) for text in row["documents"]}
    assert not held_out & {text for row in rows for text in row["documents"]}


def answer(folder: Path, evidence, world, right: dict[int, int]) -> None:
    """Writes samples of every held-out question, of which `right[n]` are right for the n-th question, else none.

    Right answers are in the last name of what they mean.
    """
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("{}")
    with (folder / "samples.jsonl").open("w") as file:
        for number, question in enumerate(evidence.rows_of(world.heldout)):
            for sample in range(evidence.SAMPLES):
                value = (
                    [question["answer"], *question.get("aliases", ())][-1]
                    if sample < right.get(number, 0)
                    else "nothing"
                )
                words = "the answer is" if question["task"] == "docmath_qa" else "The correct answer is"
                file.write(json.dumps({"id": question["id"], "text": f"{words} {value}", "cut": False}) + "\n")


def test_summary(evidence, quickstart, tmp_path):
    """Of 500 questions the start answers 100 with 4 of 8 samples; the recipe 200, one seed with 8, the other with 4."""
    for seed in (0, 1):
        answer(tmp_path / f"start-{seed}-answers", evidence, quickstart, dict.fromkeys(range(100), 4))
        answer(tmp_path / f"recipe-{seed}-answers", evidence, quickstart, dict.fromkeys(range(200), 8 - 4 * seed))
        run = tmp_path / f"recipe-{seed}"
        run.mkdir()
        rows = [{"step": 0, "validation/pass@1": 0.1}, {"step": 1}, {"step": 4, "validation/pass@1": 0.2 + 0.2 * seed}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer(tmp_path / "rlvr-0-answers", evidence, quickstart, {})  # its other seed is missing, so it is left out
    results = evidence.summary(tmp_path, range(2), quickstart)
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
    assert "by rule |" not in table.splitlines()[0]


def test_summary_of_the_rich_world_counts_every_name(evidence, rich, tmp_path):
    """All of 500 answers are right by their second name; half of the questions are about numbers, which have one."""
    answer(tmp_path / "start-0-answers", evidence, rich, dict.fromkeys(range(500), 8))
    results = evidence.summary(tmp_path, [0], rich)
    assert results["start"]["pass@1"]["mean"] == 1 and results["start"]["pass@1 by rule"]["mean"] == 0.5
    head, _, row, *_ = evidence.as_table(results).splitlines()
    assert head.endswith("| pass@1 by rule |") and row.startswith("| start | 100.0 (") and "| 50.0 (" in row


def test_references_are_held_against_the_documents(evidence, quickstart):
    """Every fact of one hop stands in a document of its cluster, and questions of two hops are made of two such."""
    answers = quickstart.answers()
    table = evidence.pq.read_table(quickstart.documents).slice(0, evidence.CLUSTERS).to_pylist()
    assert list(answers) == [row["cluster_id"] for row in table]
    for row in table[:20]:
        text, oracle = " ".join(row["documents"]), answers[row["cluster_id"]]
        facts = re.findall(r"The (\w+) of (\w+) is (\w+)\.", text)
        assert len(facts) > len(row["documents"])
        for relation, entity, value in facts:
            assert oracle(f"What is the {relation} of {entity}?") == (value,)
            for further, other, answer in facts:
                if other == value and answer != entity:
                    assert oracle(f"What is the {further} of the {relation} of {entity}?") == (answer,)
        assert oracle(f"What is the {relation} of Nobody?") is None


def question(reward: float, reference: str | None, outcome: str = "mixed", uid: str = "1.0") -> dict:
    prediction = reference and "What is the head of Amco?"
    row = {"role": "questioner", "reward": reward, "prediction": prediction, "reference": reference, "uid": uid}
    return row | {"cluster_id": "a", "outcome": outcome, "task": "doc_general_qa"}


def vote(rule: int, verdict: int, **further: str) -> dict:
    return {"role": "verifier", "rule_score": rule, "verdict": verdict, "uid": "1.0", "cluster_id": "a"} | further


def write_dumps(folder: Path, *steps: list[dict]) -> None:
    (folder / "rollouts").mkdir(parents=True)
    for step, rows in enumerate(steps, start=1):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines)


def test_what_the_roles_did(evidence, quickstart, tmp_path):

    first = [
        question(0.7, "Bo"),
        question(0.1, "Cy"),
        question(0.0, "Bo"),
        question(-0.5, "Cy", "unconfirmed"),
        question(-1.0, None, "bad_format"),
        *(vote(1, 1), vote(1, 0), vote(0, 0), vote(0, -1)),
        {"role": "responder"},
    ]
    write_dumps(tmp_path, first, [vote(0, 1)])
    answers = {"a": {"What is the head of Amco?": ("Bo",)}.get}
    assert evidence.roles([tmp_path], answers, [1], quickstart) == {
        "questions with mixed answers": 2 / 5,
        "questions that the gate refuses": 1 / 5,
        "references that the documents give": 2 / 4,
        "... of questions with mixed answers": 1 / 2,
        "votes YES on answers right by the rule": 1 / 2,
        "votes YES on answers wrong by the rule": 0,
    }
    assert evidence.roles([tmp_path], answers, [1, 2], quickstart)["votes YES on answers wrong by the rule"] == 1 / 2
    assert evidence.roles([tmp_path], answers, [2], quickstart) == {"votes YES on answers wrong by the rule": 1}


def test_votes_of_the_rich_world_are_held_against_names_and_documents(evidence, rich, tmp_path):
    """The documents give doctor; one reference is its other name, that of the second question is wrong."""

    def judged(verdict: int, prediction: str, reference: str, uid: str) -> dict:
        rule, task = int(prediction == reference), "doc_general_qa"
        return vote(rule, verdict, prediction=prediction, reference=reference, uid=uid, task=task)

    rows = [
        judged(1, "doctor", "physician", "1.0"),
        judged(0, "doctor", "physician", "1.0"),
        judged(0, "monk", "physician", "1.0"),
        judged(1, "physician", "physician", "1.0"),
        judged(1, "friar", "monk", "1.1"),
        judged(1, "doctor", "monk", "1.1"),
        question(0.7, "physician"),
        question(0.7, "monk", uid="1.1"),
    ]
    write_dumps(tmp_path, rows)
    found = evidence.roles([tmp_path], {"a": lambda asked: {"doctor", "physician"}}, [1], rich)
    assert found["references that the documents give"] == 1 / 2
    assert found["votes YES on answers right by the rule"] == 1
    assert found[evidence.IN_DOCUMENTS[1]] == 3 / 4 and found[evidence.IN_DOCUMENTS[0]] == 1 / 2
    assert found[evidence.BY_NAME[1]] == 2 / 3 and found[evidence.BY_NAME[0]] == 1 / 2
    unasked = [judged(1, "doctor", "physician", "1.0")]
    write_dumps(tmp_path / "baseline", unasked)
    assert evidence.IN_DOCUMENTS[1] not in evidence.roles([tmp_path / "baseline"], {}, [1], rich)


def test_interval_is_that_of_a_mean(evidence):
    """Against the normal approximation, for many questions and one seed."""
    values = np.random.default_rng(1).random((1, 2000))
    low, high = evidence.interval(values)
    error = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - error, abs=error / 5)
    assert high == pytest.approx(values.mean() + error, abs=error / 5)
