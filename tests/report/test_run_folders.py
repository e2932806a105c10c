"""What the report reads of a run's folder: metrics, settings, versions, in any state."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from report_data import data_of, record, write_run

from spell_megatron import __version__
from spell_megatron.monitoring.versions import note_versions
from spell_megatron.report.runs import read_run


def test_columns_stand_over_the_steps(tmp_path):
    lines = record(0, b=0.5), record(1, a=1 / 3), record(2, a=None, text="x", b=1e-9)
    run = read_run(write_run(tmp_path / "run", *lines, ""), "run")
    assert run.steps == [0, 1, 2]
    assert run.metrics == {"b": [0.5, None, 1e-9], "a": [None, 1 / 3, None]}
    assert run.times == [1795290427.5, 1795290428.5, 1795290429.5]
    assert run.notes == []


def test_the_line_that_is_being_written_is_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "run", record(1, a=1), '{"step": 2, "a":'), "run")
    assert run.steps == [1] and run.notes == []
    (tmp_path / "run" / "metrics.jsonl").write_text('{"torn\n' + record(3, a=3) + "\n[]\n" + record(4, a=4) + "\n")
    run = read_run(tmp_path / "run", "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1e999}\n\xff\xfe\n')
    assert read_run(tmp_path / "run", "run").notes == ["4 unreadable lines of metrics.jsonl left out"]
    assert run.steps == [3, 4] and run.notes == ["2 unreadable lines of metrics.jsonl left out"]


def test_what_a_resumed_run_did_again_counts(tmp_path):
    """Steps 3 to 5 were logged before the crash; the run has come back as far as step 4."""
    lines = [record(s, a=s) for s in range(6)] + [record(3, a=30), record(4, b=40)]
    run = read_run(write_run(tmp_path / "run", *lines), "run")
    assert run.steps == [0, 1, 2, 3, 4]
    assert run.metrics == {"a": [0, 1, 2, 30, None], "b": [None] * 4 + [40]}


def test_values_that_are_no_numbers(tmp_path):
    odd = "NaN, Infinity, -Infinity, null, true, [1], {}, 1" + "0" * 400
    lines = [f'{{"step": {i}, "time": {value}, "a": {value}}}' for i, value in enumerate(odd.split(", "))]
    folder = write_run(tmp_path / "run", *lines, record(9, a=1.5), "")
    run = data_of(folder, tmp_path / "report.html")["runs"][0]
    assert run["metrics"] == {"a": [None] * 8 + [1.5]} and run["first_time"] == run["last_time"] == 1795290436.5


@pytest.mark.parametrize("step", ["NaN", "Infinity", "1.5", "-1", '"3"', "true", "null", "1e400", "9" * 20, "[1]"])
def test_steps_that_are_none(step, tmp_path):
    lines = [record(1, a=1), f'{{"step": {step}, "a": 2}}', record(2, a=3), ""]
    run = read_run(write_run(tmp_path / "run", *lines), "run")
    assert run.steps == [1, 2] and run.metrics == {"a": [1, 3]}
    assert run.notes == ["1 unreadable line of metrics.jsonl left out"]


def test_a_validation_that_was_made_after_a_resume_is_added_to_its_step(tmp_path):
    lines = [record(1, **{"time/step": 9.0, "a": 1}), record(1, **{"validation/pass@1": 0.5}), ""]
    run = read_run(write_run(tmp_path / "run", *lines), "run")
    assert run.metrics == {"time/step": [9.0], "a": [1], "validation/pass@1": [0.5]}


def test_settings_of_any_kind(tmp_path):
    folder = write_run(tmp_path / "run", record(1, a=1), "")
    settings = "run: {steps: true, seed: .nan, day: 2026-11-29}\nmodel: {path: [a, null]}\nlong: " + "x" * 2000
    (folder / "config.yaml").write_text(settings)
    data = data_of(folder, tmp_path / "report.html")
    shown = dict(data["all_settings"])
    assert shown["run.steps"] == "true" and shown["run.day"] == '"2026-11-29"' and shown["run.seed"] == "NaN"
    assert data["runs"][0]["planned"] is None and data["runs"][0]["facts"]["model.path"] == '["a", null]'
    assert len(shown["long"]) < 450
    for text in ("a: &a [*a]", "\tx", "[1, 2]", "just text"):
        (folder / "config.yaml").write_text(text)
        shown = data_of(folder, tmp_path / "report.html")["all_settings"]
        assert shown == ([["a", "[[...]]"]] if "&a" in text else [])


def test_versions_of_a_run(tmp_path):
    folder = write_run(tmp_path / "run", record(1, a=1))
    assert read_run(folder, "run").versions == {}
    for step, torch in ((1, "2.1"), (2, "2.2")):  # runs of earlier versions have them in their checkpoints only
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "meta.json").write_text(json.dumps({"step": step, "torch": torch}))
    assert read_run(folder, "run").versions == {"torch": "2.2"}
    note_versions(folder)
    versions = read_run(folder, "run").versions
    assert versions["spell_megatron"] == __version__ and versions["torch"] == version("torch")
    (folder / "versions.json").write_text("{")
    assert read_run(folder, "run").versions == {"torch": "2.2"}
