"""What the policy wrote in a step, for people to read: one file per step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from spell_megatron.encodings import printable
from spell_megatron.files import appearing_file
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.outcomes import Outcome

# Many readers (str.splitlines too) end a line at these, which JSON allows inside a text.
LINE_BREAKS = {character.encode(): b"\\u%04x" % ord(character) for character in "\x85\u2028\u2029"}


def write_dump(
    samples: Iterable[Sample], folder: Path, step: int, format: Literal["none", "jsonl", "parquet"]
) -> Path | None:
    """Write the samples of a step to `folder/step_000012.jsonl` (or .parquet), one row each.

    `weight_version` wrote the row, and the update of `trained_version` learns from it. The file appears when it is
    complete and replaces an earlier one of the same step. Token ids and
    log-probabilities are left out; their numbers are there. Returns the file, None for format `none`.
    """
    if format == "none":
        return None
    rows = [_row(step, sample) for sample in samples]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.{format}"
    with appearing_file(path) as partial:
        if format == "jsonl":
            _write_jsonl(rows, partial)
        else:
            _write_parquet(rows, partial)
    return path


def _row(step: int, sample: Sample) -> dict[str, Any]:
    return {
        "step": step,
        "uid": sample.uid,
        "group": sample.group,
        "role": sample.role,
        "task": sample.task,
        "kind": _kind(sample),
        "outcome": sample.outcome,
        "reward": float(sample.reward),
        "advantage": float(sample.advantage),
        "reference": _text(sample.reference),
        "prediction": _text(sample.prediction),
        "rule_score": None if sample.rule_score is None else float(sample.rule_score),
        "verdict": None if sample.verdict is None else float(sample.verdict),
        "gate": sample.gate,
        "output": _text(sample.response),
        "prompt": _prompt(sample.prompt),
        "cluster_id": _text(sample.cluster_id),
        "document_ids": [_text(document) for document in sample.document_ids],
        "prompt_tokens": len(sample.prompt_ids),
        "response_tokens": len(sample.response_ids),
        "truncated": sample.truncated,
        "weight_version": sample.weight_version,
        "trained_version": str(step - 1),
    }


def _kind(sample: Sample) -> str:
    """Why a question's reward is not positive, in the words of the released code; `good` for all other samples."""
    if sample.role != "questioner" or sample.outcome is None or not sample.outcome.negative:
        return "good"
    kinds = {Outcome.BAD_FORMAT: "bad_format", Outcome.UNGROUNDED: "bad_ground"}
    own = (Outcome.UNCONFIRMED, Outcome.REPEATED)  # ends that the released code does not have
    return str(sample.outcome) if sample.outcome in own else kinds.get(sample.outcome, "zero_variance")


def _text(text: str | None) -> str | None:
    return text if text is None or text.isascii() else printable(text)


@lru_cache(maxsize=2)  # answers that follow one another have the same
def _prompt(text: str) -> str | None:
    return _text(text)


def _write_jsonl(rows: list[dict[str, Any]], path: Path) -> None:
    prompt, prompt_json = "", b'""'
    with path.open("wb") as file:
        for row in rows:
            if row["prompt"] != prompt:  # answers that follow one another have the same, of up to half a megabyte
                prompt = row["prompt"]
                prompt_json = _json(prompt)
            file.write(_json(row | {"prompt": msgspec.Raw(prompt_json)}) + b"\n")


def _json(value: Any) -> bytes:
    content = msgspec.json.encode(value)
    if not content.isascii():
        for character, escaped in LINE_BREAKS.items():
            content = content.replace(character, escaped)
    return content


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = dict.fromkeys(("step", "prompt_tokens", "response_tokens"), pa.int64())
    real = dict.fromkeys(("reward", "advantage", "rule_score", "verdict", "gate"), pa.float64())
    other = {"document_ids": pa.list_(pa.string()), "truncated": pa.bool_()}
    types = {**whole, **real, **other}
    empty = Sample("", "", "responder", "", "", [], [], [], "", 0.0)
    # an explicit schema: a column that is empty in this step must have the type it has in the others
    schema = pa.schema([(name, types.get(name, pa.string())) for name in _row(0, empty)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
