"""The timeline on the page and as a trace: steps, lanes, what overlaps, and what a resumed run made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_data import data_of, record, write_run

from spell_megatron.cli import main
from spell_megatron.errors import UserError
from spell_megatron.report.panels import sections
from spell_megatron.report.timeline import WORDS, Span, common, read_timeline, steps_of, timeline, union
from spell_megatron.report.trace import write_trace

BEFORE = Span(None, "starting engines", ("engines",), 0.0, 5.0)


def span(step: int | None, name: str, start: float, end: float) -> Span:
    lanes = {"rollout": ("engines",), "push": ("trainer", "engines")}.get(name, ("trainer",))
    return Span(step, name, lanes, start, end)


def two_steps() -> list[Span]:
    """The first waits, the second overlaps; each takes 10 seconds."""
    return [
        BEFORE,
        span(1, "rollout", 10, 15), span(1, "update", 15, 18), span(1, "push", 18, 19),
        span(2, "accumulate", 21, 24), span(2, "rollout", 20, 26), span(2, "update", 26, 27), span(2, "push", 27, 30),
    ]  # fmt: skip


def write(folder: Path, spans: list[Span], *more: str) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(vars(one)) for one in spans]
    (folder / "timeline.jsonl").write_text("\n".join([*lines, *more]))
    return folder


def test_a_step_lasts_until_the_next_one_begins():
    one, two = steps_of(two_steps())
    assert (one.step, one.start, one.end) == (1, 10, 20) and (two.step, two.start, two.end) == (2, 20, 30)
    assert one.work("trainer") == [(15, 19)] and one.work("engines") == [(10, 15), (18, 19)]


def test_of_a_step_that_was_made_again_the_last_time_counts():
    again = [BEFORE, span(None, "push", 101, 102), span(2, "rollout", 110, 130), span(2, "update", 130, 131)]
    steps = steps_of([*two_steps(), span(3, "rollout", 30, 31), *again])
    assert [(step.step, step.start, step.end) for step in steps] == [(1, 10, 19), (2, 110, 131)]


def test_the_pause_before_a_resume_belongs_to_no_step():
    steps = steps_of([*two_steps(), BEFORE, span(3, "rollout", 1000, 1010)])
    assert [step.end - step.start for step in steps] == [10, 10, 10]


def test_times_are_joined_and_compared():
    assert union([(3, 4), (1, 2), (1.5, 3)]) == [(1, 4)]
    assert union([(1, 2), (2.1, 3), (4, 5)], gap=0.2) == [(1, 3), (4, 5)]
    assert common([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == [(1, 2), (3, 4), (5, 6)]
    assert common([(0, 1)], [(1, 2)]) == []


def test_what_the_page_gets():
    shown = timeline(two_steps(), {1, 2})
    assert shown["count"] == 2 and shown["seconds"] == 20
    assert {name: seconds for name, _, seconds in shown["names"] if seconds} == {
        "rollout": 11, "accumulate": 3, "update": 4, "push": 4
    }  # fmt: skip
    assert shown["work"] == {"trainer": 11, "engines": 15} and shown["hidden"] == 3
    names = [name for name, _, _ in shown["names"]]
    second = shown["steps"][1]
    assert [(names[number], start, seconds) for number, start, seconds in second["trainer"]] == [
        ("accumulate", 1, 3), ("update", 6, 1), ("push", 7, 3)
    ]  # fmt: skip
    assert second["work"] == [7, 9]
    assert timeline([], {1}) is None and timeline([BEFORE], {1}) is None


def test_work_has_one_colour_in_the_section():
    (stages,) = (panel for panel in sections([], [])[-1].panels if panel.stacked)
    drawn = {series.label.removesuffix(" of weights"): series.colour for series in stages.groups[""]}
    assert drawn == {name: colour for name, colour in WORDS.items() if name != "accumulate"}


def test_a_step_that_is_under_way_or_was_given_up_is_left_out():
    """Its rollout has no span yet, and the engines would look idle."""
    shown = timeline([*two_steps(), span(3, "accumulate", 31, 35)], {0, 1, 2})
    assert shown["count"] == 2 and shown["seconds"] == 21 and shown["steps"][-1]["step"] == 2
    assert timeline([BEFORE, span(1, "accumulate", 11, 12)], {0}) is None


def test_a_long_run_with_many_pieces_is_thinned():
    spans = [BEFORE]
    for step in range(1, 1001):
        pieces = [span(step, "accumulate", step * 100 + i * 0.9, step * 100 + i * 0.9 + 0.8) for i in range(100)]
        spans += [*pieces, span(step, "rollout", step * 100, step * 100 + 95)]
    shown = timeline(spans, range(1, 1001))
    assert len(shown["steps"]) == 200 and shown["count"] == 1000
    assert [shown["steps"][place]["step"] for place in (0, -1)] == [1, 1000]
    assert all(len(step["trainer"]) == 1 for step in shown["steps"])
    assert shown["work"]["trainer"] == pytest.approx(80 * 1000)


def test_lines_that_are_no_spans_are_left_out(tmp_path):
    odd = ['{"step": "x", "name": "a", "lanes": [], "start": 1, "end": 2}', "[]", '{"step": 1}', "x", '{"step": 2, "na']
    backwards = '{"step": 1, "name": "a", "lanes": ["trainer"], "start": 2, "end": 1}'
    assert read_timeline(write(tmp_path / "run", two_steps(), *odd, backwards)) == two_steps()
    assert read_timeline(tmp_path) == []


def test_the_page_of_a_run_with_and_without_a_timeline(tmp_path):
    run = write_run(tmp_path / "run", record(1, time__step=1.0), record(2, time__step=1.0))
    assert data_of(run, tmp_path / "without.html")["runs"][0]["timeline"] is None
    write(run, two_steps())
    assert data_of(run, tmp_path / "with.html")["runs"][0]["timeline"]["count"] == 2


def test_a_trace_has_a_process_for_each_run_and_a_thread_for_each_lane(tmp_path, capsys):
    folders = [write(tmp_path / name, two_steps()) for name in ("a", "b")]
    assert main(["report", *map(str, folders), "--trace", str(tmp_path / "trace.json")]) == 0
    assert "16 spans of 2 runs" in capsys.readouterr().out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["a", "b"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(lanes.values()) == 2 * ["steps", "trainer", "engines"]
    assert not lanes.keys() & {0, 1, 2}  # Perfetto takes 0 for the idle thread, and a process's number for its main one
    drawn = [(lanes[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert ("engines", "starting engines", 0, 5_000_000) in drawn
    assert ("trainer", "accumulate", 21_000_000, 3_000_000) in drawn
    assert ("steps", "step 2", 20_000_000, 10_000_000) in drawn
    assert {lane for lane, name, *_ in drawn if name == "push"} == {"trainer", "engines"}


def test_a_folder_without_a_timeline_has_no_trace(tmp_path):
    with pytest.raises(UserError, match=r"has no timeline\.jsonl"):
        write_trace([write_run(tmp_path / "run", record(1))], tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()
