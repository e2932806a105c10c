"""What the report says went wrong in a run, and what the policy learned: each condition by its smallest run."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from simulated_run import make_run

from spell_megatron.config.schema import Config
from spell_megatron.report import health
from spell_megatron.report.health import CONDITIONS, findings
from spell_megatron.report.runs import read_run
from spell_megatron.report.verdict import verdict
from spell_megatron.selfplay import outcomes

HEALTHY = {
    "train/skipped": 0.0,
    "train/grad_norm": 0.5,
    "train/lr": 1e-6,
    "train/entropy": 0.3,
    "train/mismatch_abs": 4e-3,
    "selfplay/rate/mixed": 0.4,
    "selfplay/rate/all_0": 0.35,
    "selfplay/rate/all_1": 0.25,
    "selfplay/rate/yes_on_right": 0.95,
    "selfplay/rate/yes_on_wrong": 0.05,
    "selfplay/rate/invalid_votes": 0.02,
    "selfplay/rate/truncated_answers": 0.0,
    "selfplay/rate/unparsed_answers": 0.02,
    "rollout/restarts": 0,
    "time/step": 10.0,
}
NO_NUMBERS = {"docmath_qa__rate__unparsable_number": 0.8}
ACCURACY = "validation__pass@1"
ERROR = {"validation__standard_error": 0.02}
OTHERS = {ACCURACY: [0.4, 0.4, 0.4, 0.9], **ERROR}
STATUS = {"state": "finished", "steps": 4, "time": 0.0}


def write_run(folder: Path, steps: int = 4, settings: str = "run: {steps: 4}", status: dict | None = None, **changes):
    """A run of healthy steps, but for `changes`: metric (`__` for `/`) -> the value of every step, or one for each."""
    folder.mkdir()
    lines = []
    for i in range(steps):
        record = {"step": i + 1, "time": 1000.0 + 10 * i} | HEALTHY
        for name, value in changes.items():
            name = re.sub(r"^(?=rate/|\w+_qa/)", "selfplay/", name.replace("__", "/"))
            record[name] = value[i] if isinstance(value, list) else value
        lines.append(json.dumps({name: value for name, value in record.items() if value != "absent"}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text(settings)
    (folder / "status.json").write_text(json.dumps(STATUS | (status or {})))
    return read_run(folder, "run")


def titles(run) -> list[str]:
    return [finding.title for finding in findings(run)]


def test_a_healthy_run_has_no_faults(tmp_path):
    assert findings(write_run(tmp_path / "small")) == []
    run = read_run(make_run(tmp_path / "simulated", 30, dump="none"), "run")
    assert findings(run) == []
    assert verdict(run).questions == 500 and verdict(run).error == pytest.approx(0.4 / 500**0.5)


def test_a_healthy_run_that_goes_on_has_no_faults(tmp_path):
    assert findings(write_run(tmp_path / "run", steps=2, status={"state": "running", "time": time.time()})) == []


@pytest.mark.parametrize(
    ("title", "words", "changes"),
    [
        ("The policy was not trained", "None of 4 steps", {"train__skipped": 1.0, "train__grad_norm": None}),
        ("The policy was not trained", "nothing to train on", {"train__empty": 1.0, "train__skipped": "absent"}),
        ("The policy was not trained", "learning rate was 0", {"train__lr": 0.0}),
        ("The policy was not trained", "gradient was 0", {"train__grad_norm": 0.0}),
        ("Updates were left out", "1 of 4 updates .*step 3", {"train__skipped": [0, 0, 1, 0]}),
        ("Numbers were not finite", "train/loss in step 2", {"train__loss": [0.1, None, 0.1, 0.1]}),
        ("Numbers were not finite", "train/loss in steps 1, 2", {"train__loss": [float("nan"), float("inf"), 0, 0]}),
        ("Steps had nothing to train on", "1 of 4 steps .*step 2", {"train__empty": [0, 1, 0, 0]}),
        ("Few questions teach", "0.0% .*100% all answers", {"rate__mixed": 0, "rate__all_0": 1, "rate__all_1": 0}),
        ("Most questions cannot be used", "90% of the attempts failed; 90% bad format", {"rate__bad_format": 0.9}),
        ("Most questions cannot be used", "of docmath_qa failed; 80% reference is no number", NO_NUMBERS),
        ("The verifier does not judge", "YES to 97% .*96%", {"rate__yes_on_right": 0.97, "rate__yes_on_wrong": 0.96}),
        ("The verifier does not judge", "YES to 0% .*0%", {"rate__yes_on_right": 0.0, "rate__yes_on_wrong": 0.0}),
        ("The verifier does not judge", "90% of its votes were invalid", {"rate__invalid_votes": 0.9}),
        ("Engine and trainer disagree", "0.71", {"train__mismatch_abs": 0.71}),
        ("Engine and trainer disagree", "2.5 at most", {"train__mismatch_abs": [0.01, 2.5, 0.01, 0.01]}),
        ("Every gradient was clipped", "4 of 4 .*clip_grad = 1 .*median 30", {"train__grad_norm": 30.0}),
        ("Answers are cut off", "90%", {"rate__truncated_answers": 0.9}),
        ("Answers state no result", "90%", {"rate__unparsed_answers": 0.9}),
        ("The policy hardly varies", "0.001 nats", {"train__entropy": 0.001}),
        ("Held-out accuracy fell", "by 20.0 points", {ACCURACY: [0.5, "absent", "absent", 0.3], **ERROR}),
        ("Engines had to be restarted", "3 time.*steps 2, 4", {"rollout__restarts": [0, 1, 0, 2]}),
    ],
)  # fmt: skip
def test_what_went_wrong_is_told_with_its_remedy(title, words, changes, tmp_path):
    found = findings(write_run(tmp_path / "run", **changes))
    assert [finding.title for finding in found] == [title]
    assert re.search(words, found[0].text), found[0].text
    assert len(found[0].remedy) > 20 and "{" not in found[0].remedy


def test_a_verifier_that_says_yes_to_everything_is_the_one_cause_of_few_mixed_groups(tmp_path):
    """No finding says that the questions are too easy, or that the gate is too strict."""
    rates = {"mixed": 0, "unconfirmed": 0.6, "all_0": 0, "all_1": 0.4, "yes_on_right": 0.98, "yes_on_wrong": 0.97}
    changes = {f"rate__{name}": rate for name, rate in (rates | {"right_by_verdict_only": 0.5}).items()}
    found = {finding.title: finding for finding in findings(write_run(tmp_path / "run", **changes))}
    assert list(found) == ["The verifier does not judge", "Few questions teach", "Most questions cannot be used"]
    for title in ("The verifier does not judge", "Few questions teach"):
        assert "selfplay.verifier.enabled: false" in found[title].remedy
        assert "training.role_weights" in found[title].remedy
    assert found["Few questions teach"].remedy.startswith("The verifier says YES to 97% of the answers")
    empty = findings(write_run(tmp_path / "empty", train__empty=1.0, train__skipped="absent", **changes))
    assert "The verifier says YES" in next(f for f in empty if f.title == "The policy was not trained").remedy


@pytest.mark.parametrize(
    ("title", "words", "status"),
    [
        ("The run failed", "No such engine", {"state": "failed", "message": "No such engine"}),
        ("The run failed", "No space left", {"state": "failed", "message": "[Errno 28] No space left on device: 'x'"}),
        ("The run gives no sign of life", "has said nothing for", {"state": "running", "time": 1000.0}),
        ("The run ended before its last step", "was stopped; its last step is 2 of 4", {"state": "stopped"}),
    ],
)
def test_a_run_that_did_not_reach_its_end(title, words, status, tmp_path):
    found = findings(write_run(tmp_path / "run", steps=2, status=status))
    assert [finding.title for finding in found] == [title] and words in found[0].text
    assert "--resume" in found[0].remedy
    assert ("Free some space" in found[0].remedy) == ("No space" in words)


def test_a_run_that_was_stopped_before_its_last_validation(tmp_path):
    found = findings(write_run(tmp_path / "run", status={"state": "stopped"}))
    assert [finding.text for finding in found] == ["It was stopped before its last validation."]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": "running"}', "\xff"])
def test_a_status_that_cannot_be_read_says_nothing(content, tmp_path):
    write_run(tmp_path / "run", steps=2)
    (tmp_path / "run" / "status.json").write_bytes(content.encode("latin-1"))
    assert titles(read_run(tmp_path / "run", "run")) == ["The run ended before its last step"]


def test_thresholds_follow_the_settings(tmp_path):
    """A nucleus of half the probability shifts log-probabilities by log 2; another limit of the gradient clips less."""
    settings = "{run: {steps: 4}, rollout: {sampling: {top_p: 0.5}}, training: {optimizer: {clip_grad: 50}}}"
    assert (
        findings(write_run(tmp_path / "run", settings=settings, train__mismatch_abs=0.7, train__grad_norm=30.0)) == []
    )
    settings = "{run: {steps: 4}, training: {staleness: 1, importance_sampling: token}}"
    assert findings(write_run(tmp_path / "stale", settings=settings, train__mismatch_abs=0.7)) == []
    settings = "{run: {steps: 4}, training: {optimizer: {clip_grad: 0}}}"
    assert findings(write_run(tmp_path / "unclipped", settings=settings, train__grad_norm=30.0)) == []


def test_grave_faults_come_first(tmp_path):
    run = write_run(tmp_path / "run", train__grad_norm=30.0, train__mismatch_abs=0.7)
    assert titles(run) == ["Engine and trainer disagree", "Every gradient was clipped"]


def test_few_updates_say_nothing_of_clipping(tmp_path):
    assert findings(write_run(tmp_path / "run", steps=1, settings="run: {steps: 1}", train__grad_norm=30.0)) == []


def test_the_docs_name_every_condition():
    docs = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert [line for condition in CONDITIONS if (line := f"\n| {condition.title} | ") not in docs] == []


def test_every_condition_is_found_by_some_test():
    told = test_what_went_wrong_is_told_with_its_remedy, test_a_run_that_did_not_reach_its_end
    tried = {case[0] for test in told for mark in test.pytestmark for case in mark.args[1]}
    assert tried == {condition.title for condition in CONDITIONS}


@pytest.mark.parametrize(
    ("kind", "words", "changes"),
    [
        ("unknown", "was not measured", {}),
        ("unknown", "measured once, after step 1", {ACCURACY: [0.4, "absent", "absent", "absent"], **ERROR}),
        ("better", "rose by 10.0 points; chance explains ±5.7", {ACCURACY: [0.4, "absent", 0.1, 0.5], **ERROR}),
        ("same", "No measurable change: -2.0 points", {ACCURACY: [0.4, 0.4, 0.4, 0.38], **ERROR}),
        ("worse", "fell by 10.0 points", {ACCURACY: [0.5, 0.5, 0.5, 0.4], **ERROR}),
        ("unknown", "changed by +10.0 points", {ACCURACY: [0.4, 0.4, 0.4, 0.5]}),
        ("unknown", "No update was made", {ACCURACY: 0.369, "train__skipped": 1.0, **ERROR}),
        ("unknown", "questions changed", OTHERS | {"validation__questions": [9, 9, 9, 5]}),
        ("unknown", "questions changed", OTHERS | {"validation__question_set": [1, 1, 1, 2]}),
    ],
)  # fmt: skip
def test_what_the_policy_learned(kind, words, changes, tmp_path):
    found = verdict(write_run(tmp_path / "run", **changes))
    assert found.kind == kind and words in found.text


def test_remedies_name_settings_that_exist():
    sections = "|".join(name for name in Config.model_fields if name != "run")  # `run` is an object there
    sources = "".join(Path(module.__file__).read_text() for module in (health, outcomes))
    named = set(re.findall(rf"(?<![.\w])(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*", sources))
    named -= {name for name in named if name.endswith(".py")}
    assert len(named) > 5
    for name in named:
        kind = Config
        for part in name.split("."):
            assert part in kind.model_fields, name
            kind = kind.model_fields[part].annotation
