"""metrics.jsonl and TensorBoard: what is written, and what a resumed run leaves of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spell_megatron.config.schema import LoggingConfig
from spell_megatron.monitoring.describe import describe
from spell_megatron.monitoring.metrics import MetricsLogger, _wandb_id

SETTINGS = {"run": {"name": "test"}}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(folder: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "time"} for record in records(folder)]


def test_a_step_is_one_line_that_is_there_at_once(tmp_path):
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS) as log:
        assert not (tmp_path / "metrics.jsonl").exists()  # its presence means that there are results
        log.log(1, {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0), "d": True, "note": "text"})
        assert without_time(tmp_path) == [{"step": 1, "a": 1, "b": 0.5, "c": 2.0, "d": 1, "note": "text"}]
        log.log(2, {"a": 3, "long": "x" * 100})  # longer than what replaces it
        log.log(2, {"validation/pass@1": 0.25, "a": 4, "long": "y"})
        assert without_time(tmp_path)[1:] == [{"step": 2, "a": 4, "long": "y", "validation/pass@1": 0.25}]
        log.log(3, {"a": 5})
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS) as log:
        log.log(1, {"grad_norm": float("nan"), "loss": np.inf})
    assert without_time(tmp_path) == [{"step": 1, "grad_norm": None, "loss": None}]


def test_what_is_logged_for_the_step_of_a_resume_is_added_to_it(tmp_path):
    """Such as the validation that a stop interrupted."""
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS) as log:
        log.log(1, {"a": 1, "note": "é"})
        log.log(2, {"a": 2})
        log.log(3, {"a": 3})
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS, resume_step=2) as log:
        log.log(2, {"validation/pass@1": 0.5})
        log.log(3, {"a": 30})
    expected = [{"step": 1, "a": 1, "note": "é"}, {"step": 2, "a": 2, "validation/pass@1": 0.5}, {"step": 3, "a": 30}]
    assert without_time(tmp_path) == expected


def test_resuming_removes_what_came_after_the_checkpoint(tmp_path):
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS) as log:
        for step in range(6):
            log.log(step, {"a": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a":')  # a crash cut this line short
    time.sleep(1)  # TensorBoard reads event files by the second in which they were made, and those of one by name
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS, resume_step=3) as log:
        assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3]
        log.log(4, {"a": 40})
        log.log(5, {"a": 50})
    assert without_time(tmp_path)[3:] == [{"step": 3, "a": 3}, {"step": 4, "a": 40}, {"step": 5, "a": 50}]

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)
    ]  # fmt: skip


ODD_ENDS = [
    b"\xff\xfe\x80", bytes(4096), b'{"step": null}\n', b'{"step": "4"}\n', b'{"step": [1], "a": 2}\n', b'{"a": 1}\n',
    b"[1]\n", b"7\n", b'{"step": 2, "note": "caf\xc3', b"\x1f\x8b\x08", b"[" * 100_000, b"1" * 5000, b"\r\0\n",
]  # fmt: skip


@pytest.mark.parametrize("end", ODD_ENDS, ids=lambda end: ascii(end[:12]))
def test_odd_bytes_at_the_end_do_not_stop_a_resumed_run(tmp_path, end):
    """A machine that fails can leave anything after the last line that reached the disk."""
    lines = b'{"step": 0, "a": 0}\n{"step": 1, "a": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines + end)
    said = {"state": "running", "steps": 9, "host": "n1", "pid": 1, "job": None, "restart": 0, "time": 0.0}
    assert any("1/9" in line for line in describe(tmp_path, said))
    with MetricsLogger(tmp_path, LoggingConfig(), SETTINGS, resume_step=1) as log:
        log.log(2, {"a": 2})
    assert without_time(tmp_path) == [{"step": step, "a": step} for step in range(3)]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLogger(tmp_path, LoggingConfig(), SETTINGS).close()
    assert records(tmp_path) == []


def test_weights_and_biases_gets_every_step(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsLogger(tmp_path, LoggingConfig(wandb=True), SETTINGS) as log:
        log.log(1, {"a": 1.0})
        assert wandb.run.summary["a"] == 1.0 and wandb.run.summary["step"] == 1
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_weights_and_biases_knows_whose_the_run_is(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    place = {"wandb_entity": "team", "wandb_group": "seeds", "wandb_tags": ["16k", "smoke test"], "wandb_project": "p"}
    with MetricsLogger(tmp_path, LoggingConfig(wandb=True, wandb_offline=True, **place), SETTINGS):
        run = wandb.run
        assert (run.entity, run.project, run.group, run.tags) == ("team", "p", "seeds", ("16k", "smoke test"))
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_weights_and_biases_that_nobody_has_logged_in_to_is_told_without_a_stack_trace(tmp_path):
    """In a process of its own: wandb reads its environment once."""
    pytest.importorskip("wandb")
    code = (
        "from pathlib import Path; from spell_megatron.config.schema import LoggingConfig; "
        "from spell_megatron.errors import UserError; from spell_megatron.monitoring.metrics import MetricsLogger\n"
        "try: MetricsLogger(Path('run'), LoggingConfig(wandb=True), {'run': {'name': 'test'}})\n"
        "except UserError as error: print(error)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "Weights & Biases does not take the run" in result.stdout and "`wandb login`" in result.stdout


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", bytes(32)])
def test_the_name_at_weights_and_biases_stays_unless_it_is_damaged(tmp_path, content):
    path = tmp_path / "wandb_id.txt"
    if content is not None:
        path.write_bytes(content)
    name = _wandb_id(path)
    assert name.isalnum() and _wandb_id(path) == name


def test_importing_the_reporting_modules_does_not_import_torch():
    code = (
        "import sys; import spell_megatron.monitoring.metrics, spell_megatron.monitoring.progress, "
        "spell_megatron.monitoring.dumps, spell_megatron.cli; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
