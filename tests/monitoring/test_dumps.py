"""Rollout dumps: every field that a person wants to read, in both formats, for any text."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spell_megatron.monitoring.dumps import write_dump
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.outcomes import Outcome


def sample(**changes) -> Sample:
    values = dict(
        uid="3.0", group="3.0/answers", role="responder", task="doc_general_qa", cluster_id="c1",
        prompt_ids=[1, 2, 3], response_ids=[4, 5], logprobs=[-0.1, -0.2], weight_version="2", reward=1.0,
        advantage=0.5, prompt="Who?", response="Ada", reference="Ada", prediction="Ada", rule_score=1.0,
        verdict=1.0, outcome=Outcome.ALL_0, document_ids=["d1", "d2"],
    )  # fmt: skip
    return Sample(**values | changes)


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_hold_what_the_samples_held(tmp_path, format):
    unknown = dict.fromkeys(("reference", "prediction", "rule_score", "verdict"))
    question = sample(role="questioner", reward=-1, **unknown)
    path = write_dump([sample(), question], tmp_path / "rollouts", 12, format)
    assert path == tmp_path / "rollouts" / f"step_000012.{format}"
    answer_row, question_row = read(path)
    assert answer_row == {
        "step": 12, "uid": "3.0", "group": "3.0/answers", "role": "responder", "task": "doc_general_qa",
        "kind": "good", "reward": 1.0, "advantage": 0.5, "reference": "Ada", "prediction": "Ada",
        "rule_score": 1.0, "verdict": 1.0, "output": "Ada", "prompt": "Who?", "cluster_id": "c1",
        "document_ids": ["d1", "d2"], "prompt_tokens": 3, "response_tokens": 2, "truncated": False,
        "weight_version": "2", "trained_version": "11", "outcome": "all_0", "gate": None,
    }  # fmt: skip
    assert question_row == answer_row | unknown | {"role": "questioner", "reward": -1.0, "kind": "zero_variance"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("text", ["a\nb \u2028 \x85 \x00", "日本語 🙂", r'{"a": "\ud800"}', "half \ud800"])
def test_any_text_can_be_dumped(tmp_path, format, text):
    rows = read(write_dump([sample(response=text, prediction=text)], tmp_path, 1, format))
    assert rows[0]["output"] == rows[0]["prediction"] == text.replace("\ud800", "\\ud800")


def test_the_columns_of_parquet_do_not_depend_on_the_rows(tmp_path):
    filled = write_dump([sample()], tmp_path, 1, "parquet")
    hollow = write_dump([sample(reference=None, verdict=None, document_ids=[])], tmp_path, 2, "parquet")
    empty = write_dump([], tmp_path, 3, "parquet")
    assert pq.read_schema(filled) == pq.read_schema(hollow) == pq.read_schema(empty)


def test_a_step_done_again_replaces_its_file_and_none_writes_nothing(tmp_path):
    write_dump([sample(), sample()], tmp_path, 1, "jsonl")
    assert len(read(write_dump([sample()], tmp_path, 1, "jsonl"))) == 1
    assert write_dump([sample()], tmp_path / "off", 1, "none") is None
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_error_of_a_full_disk_names_the_file(tmp_path, format):
    """The operating system's does not: it comes from a write. A limit of files' sizes stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # Python ignores its signal
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_dump([sample(prompt="long " * 10_000)], tmp_path, 4, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / f"step_000004.{format}")
    assert not list(tmp_path.iterdir())
