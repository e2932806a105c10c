"""timeline.jsonl: what trainer and engines did, and when."""

import io
import json
import time

import pytest
from rich.console import Console

from spell_megatron.monitoring.progress import Progress
from spell_megatron.monitoring.timeline import Timeline


def spans(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines() if line.strip()]


def progress(folder) -> Progress:
    return Progress(console=Console(file=io.StringIO()), timeline=Timeline(folder))


def test_stages_and_pieces_of_work_are_recorded_with_their_step_and_lanes(tmp_path):
    shown, before = progress(tmp_path), time.time()
    with shown.stage("starting engines"):
        pass
    shown.begin_step(3)
    with shown.stage("rollout", 4), shown.span("accumulate"):
        pass
    with shown.stage("push"):
        pass
    found = spans(tmp_path)
    assert [(one["step"], one["name"], one["lanes"]) for one in found] == [
        (None, "starting engines", ["engines"]),
        (3, "accumulate", ["trainer"]),
        (3, "rollout", ["engines"]),
        (3, "push", ["trainer", "engines"]),
    ]
    piece, rollout = found[1:3]
    assert rollout["start"] <= piece["start"] <= piece["end"] <= rollout["end"]
    assert before - 0.01 <= rollout["start"] and rollout["end"] <= time.time() + 0.01


def test_work_that_ended_before_its_stage_is_recorded_as_long_as_it_took(tmp_path):
    shown = progress(tmp_path)
    with shown.stage("rollout"):
        with shown.span("accumulate"):
            pass
        ended = time.monotonic()
        time.sleep(0.05)
        shown.ended(ended)
    with shown.stage("update"):
        time.sleep(0.05)
    piece, rollout, update = spans(tmp_path)
    assert piece["end"] <= rollout["end"] <= update["start"] - 0.04 and update["end"] - update["start"] > 0.04


def test_a_stage_that_fails_is_recorded(tmp_path):
    with pytest.raises(RuntimeError), progress(tmp_path).stage("update"):
        raise RuntimeError
    assert [one["name"] for one in spans(tmp_path)] == ["update"]


def test_a_clock_that_is_set_does_not_move_what_follows(tmp_path, monkeypatch):
    timeline, now = Timeline(tmp_path), time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86400)
    with timeline.span("update"):
        pass
    assert spans(tmp_path)[0]["start"] >= now - 0.01


def test_a_resumed_run_goes_on_in_the_same_file_after_a_line_that_was_cut(tmp_path):
    with Timeline(tmp_path).span("rollout"):
        pass
    whole = (tmp_path / "timeline.jsonl").read_text()
    (tmp_path / "timeline.jsonl").write_text(whole + '{"step": 2, "na')
    with Timeline(tmp_path).span("update"):
        pass
    lines = (tmp_path / "timeline.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["name"] == "update" and whole.strip() in lines


def test_a_disk_that_takes_nothing_does_not_end_the_run(tmp_path):
    (tmp_path / "timeline.jsonl").mkdir()
    with Timeline(tmp_path).span("update"):
        pass
