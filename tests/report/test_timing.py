"""How long a run worked: without its pauses, whatever the clock did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spell_megatron.report.runs import read_run
from spell_megatron.report.timing import duration, timing

DAY = 86400.0


def took(folder: Path, *records: dict):
    """Timing of a run with these records, whose steps are numbered from 0."""
    lines = [json.dumps({"step": step} | record) + "\n" for step, record in enumerate(records)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return timing(read_run(folder, "run"))


def test_measured_durations_count_and_a_pause_does_not(tmp_path):
    """The run was resumed three days after its second step, and took two minutes to start."""
    found = took(
        tmp_path,
        {"time": 1000.0, "time/validation": 30.0},
        {"time": 1100.0, "time/step": 100.0},
        {"time": 1250.0, "time/step": 100.0, "time/validation": 50.0},
        {"time": 1250.0 + 3 * DAY + 120 + 100, "time/step": 100.0},
    )
    assert found.seconds == [30, 100, 150, 100]
    assert found.pauses == [(3, 3 * DAY + 120)] and found.set_back == []


def test_a_clock_that_is_set_back(tmp_path):
    times = {"time": 5000.0}, {"time": 5010.0}, {"time": 1000.0}, {"time": 1010.0}
    measured = [record | {"time/step": 9.0} for record in times]
    found = took(tmp_path, *measured)
    assert found.seconds == [9.0] * 4 and found.pauses == [] and found.set_back == [2]
    found = took(tmp_path, *times)  # of an older version, which logged no durations: the usual one is taken
    assert found.seconds == [0, 10, 10, 10] and found.set_back == [2]


def test_times_of_day_stand_in_for_durations(tmp_path):
    times = [0, 10, 20, 20 + 3 * DAY, 30 + 3 * DAY]
    found = took(tmp_path, *({"time": 1000.0 + time} for time in times))
    assert found.seconds == [0, 10, 10, 10, 10] and found.pauses == [(3, 3 * DAY - 10)]


@pytest.mark.parametrize("time", [None, "noon", float("nan"), True, 10**400])
def test_times_that_are_none(time, tmp_path):
    found = took(tmp_path, {"time": time}, {"time": 10.0, "time/step": 5.0}, {"time": time}, {})
    assert found.seconds == [0, 5, 0, 0] and found.pauses == []


def test_a_run_of_one_step_and_of_none(tmp_path):
    assert took(tmp_path, {"time": 1000.0}).seconds == [0]
    assert took(tmp_path).seconds == []


def test_durations_in_words():
    assert [duration(seconds) for seconds in (0.4, 119, 120, 7199, 7200, 2 * DAY - 60, 2 * DAY, 10.5 * DAY)] == [
        "0 s", "119 s", "2 min", "2 h 0 min", "2 h 0 min", "47 h 59 min", "2 d 0 h", "10 d 12 h"
    ]  # fmt: skip
