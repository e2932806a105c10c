"""`spell report`: one page of HTML about runs and evaluations, which needs nothing but a browser.

Plots are drawn by uPlot (MIT licence, in `page/`): its 51 KB can stand in every page, where plotly.js takes 4.8 MB and
its plots a good part of a second each.

What the runs logged and what the policy wrote is embedded compressed, as base64: no text of a model can end a script
or become markup, and a browser builds the page from it with text nodes only. A content security policy forbids the
page every connection and every script but its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from spell_megatron.errors import UserError
from spell_megatron.files import json_lines, write_text
from spell_megatron.report.evaluations import columns, is_evaluation, read_evaluation
from spell_megatron.report.panels import outcome_labels, sections, table

PAGE = Path(__file__).with_name("page")
SCRIPTS = (
    "uPlot.iife.min.js",
    "elements.js",
    "numbers.js",
    "plots.js",
    "overview.js",
    "evaluations.js",
    "transcripts.js",
    "page.js",
)

MAX_JUDGMENT_SHARE = 4
"""A judgment may be this many times shorter than other texts: an answer has many of them."""

QUESTIONS_PER_STEP = 5
"""Transcripts come from as many steps as give about so many questions each."""


@dataclass
class Run:
    """What the folder of a run holds. `metrics` are columns over `steps`, None where a step did not log the metric."""

    folder: Path
    name: str
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    first_time: float | None = None
    last_time: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def planned(self) -> int | None:
        """Steps that the run was to take, if its config.yaml says so."""
        planned = self.settings.get("run.steps")
        return planned if isinstance(planned, int) else None


def write_report(
    folders: Sequence[Path],
    out: Path,
    transcripts: int = 200,
    text_chars: int = 2000,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write the report of some runs and evaluations to the file `out`, which appears when it is complete.

    Args:
        folders: of runs, as `spell train` makes them, which may still be going, and of evaluations (`spell evaluate`).
            A folder may be both.
        transcripts: most questions per run that are shown with all that became of them.
        text_chars: longer texts in them lose their middle; judgments are cut to a quarter of it.
        on_progress: gets the number of files of transcripts read, and of all to be read.

    Returns:
        A line that says what was written and what was left out.

    Raises:
        UserError: a folder is no run and no evaluation that has ended, there is no evaluation and no run has logged a
            step yet, or `out` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the file to write, such as {out / 'report.html'}.")
    names = dict(zip(folders, _names(folders), strict=True))
    evaluations = [read_evaluation(folder, name) for folder, name in names.items() if is_evaluation(folder)]
    runs = [read_run(folder, name) for folder, name in names.items() if not is_evaluation(folder) or _is_run(folder)]
    if not evaluations and not any(run.steps for run in runs):
        raise UserError(
            f"There is nothing to report yet: {', '.join(str(run.folder) for run in runs)} has not logged a step. "
            "A run logs its first numbers after its first step, or after a validation at its start."
        )
    chosen = {run.name: _dumps(run, transcripts) for run in runs}
    done, total = 0, sum(len(files) for files in chosen.values())
    questions: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        for file, count in chosen[run.name]:
            questions += read_questions(file, count, text_chars, index, run.notes)
            done += 1
            on_progress(done, total)
        if run.steps and not chosen[run.name] and transcripts:
            run.notes.append("no transcripts: its folder rollouts/ holds none (logging.dump: none)")
    page = render(runs, evaluations, questions, text_chars)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    steps = sum(len(run.steps) for run in runs)
    line = f"{out}: {len(page) / 1e6:.1f} MB, {len(runs)} run(s), {steps} steps, "
    line += f"{len(questions)} questions with transcripts"
    if evaluations:
        line += f", {len(evaluations)} evaluation(s)"
    return "\n".join([line, *(f"  {run.name}: {note}" for run in runs for note in run.notes)])


# ------------------------------------------------------------------------------------------- runs


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


def read_run(folder: Path, name: str) -> Run:
    """Read metrics and settings of a run.

    A line that is not complete (the run is being written, or crashed) is left out. When a step comes again (the run
    was resumed), what was logged from it on before no longer counts.

    Raises:
        UserError: the folder is not one of a run.
    """
    log, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not _is_run(folder):
        found = sorted(str(below) for below in folder.glob("*") if _is_run(below) or is_evaluation(below))
        hint = f" It holds such folders, though: {', '.join(found[:5])}." if found else ""
        if (folder / "evaluation.json").is_file():
            hint = " An evaluation was begun in it: run its command again, and it goes on."
        raise UserError(
            f"{folder} is not the folder of a run or an evaluation: it has none of metrics.jsonl, config.yaml and "
            f"scores.json.{hint}"
        )
    run = Run(folder, name)
    if config.is_file():
        run.settings = _settings(config, run.notes)
    records: dict[int, dict[str, Any]] = {}
    unreadable: list[int] = []
    last = 0
    for last, record, _ in json_lines(log) if log.is_file() else ():
        try:
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            unreadable.append(last)
            continue
        if records and step <= max(records):
            records = {earlier: kept for earlier, kept in records.items() if earlier < step}
        records[step] = record
    # The last line has no line break while it is being written.
    if (count := len(unreadable) - (last in unreadable and not log.read_bytes().endswith(b"\n"))) > 0:
        run.notes.append(f"{count} unreadable line(s) of metrics.jsonl left out")
    run.steps = sorted(records)
    names = {name: None for step in run.steps for name in records[step]}
    for name in names:
        column = [_number(records[step].get(name)) for step in run.steps]
        if name not in ("step", "time") and any(value is not None for value in column):
            run.metrics[name] = column
    times = [t for step in run.steps if isinstance(t := records[step].get("time"), int | float)]
    if times:
        run.first_time, run.last_time = times[0], times[-1]
    if not run.steps:
        run.notes.append("has not logged a step yet")
    elif run.planned and run.steps[-1] < run.planned:
        run.notes.append(f"step {run.steps[-1]} of {run.planned}: still going, or stopped early")
    return run


def _number(value: Any) -> float | None:
    """A number with as many digits as a plot can show; None for texts and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _settings(config: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(_flat(yaml.safe_load(config.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        notes.append(f"its config.yaml cannot be read ({type(error).__name__})")
        return {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its last part, or as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("A folder is named twice. Name each of them once.")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            break
    return names


# ------------------------------------------------------------------------------------ transcripts


def _dumps(run: Run, transcripts: int) -> list[tuple[Path, int]]:
    """Files of transcripts to read, at evenly spread steps, and how many questions to take from each."""
    last = run.steps[-1] if run.steps else -1  # files of later steps are those of a step that is not done
    files = {}
    for file in sorted((run.folder / "rollouts").glob("step_*.*")):
        match = re.fullmatch(r"step_(\d+)\.(jsonl|parquet)", file.name)
        if match and int(match[1]) <= last:
            files[int(match[1])] = file
    steps = sorted(files)
    wanted = min(len(steps), -(-transcripts // QUESTIONS_PER_STEP))
    chosen = [steps[i] for i in _spread(len(steps), wanted)]
    shares = [transcripts * (i + 1) // wanted - transcripts * i // wanted for i in range(wanted)]
    if chosen and len(chosen) < len(steps):
        run.notes.append(f"transcripts of {len(chosen)} of its {len(steps)} steps; --transcripts N for more")
    return [(files[step], share) for step, share in zip(chosen, shares, strict=True)]


def _spread(length: int, count: int) -> list[int]:
    """`count` positions of a sequence, evenly spread, the first and the last among them."""
    if count == 1:
        return [length - 1]
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def read_questions(file: Path, count: int, text_chars: int, run: int, notes: list[str]) -> list[dict[str, Any]]:
    """At most `count` questions of a step's file, each with its answers and judgments, as the page wants them.

    Of every task and outcome there are as many as of the others, as far as there are enough.
    """
    try:
        questions = [_question(list(rows), text_chars, run) for _, rows in groupby(_rows(file), lambda row: row["uid"])]
    except (ValueError, KeyError, TypeError, OSError) as error:
        notes.append(f"{file.name} cannot be read ({type(error).__name__}: {error}) and is left out")
        return []
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        kinds[question["task"], question["outcome"]].append(index)
    taken: list[int] = []
    quotas = dict.fromkeys(kinds, 0)
    while len(taken) < min(count, len(questions)):
        for kind, members in kinds.items():
            if quotas[kind] < len(members) and len(taken) < count:
                taken.append(members[quotas[kind]])
                quotas[kind] += 1
    return [questions[index] for index in sorted(taken)]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".jsonl":
        for number, row, fault in json_lines(file):
            if fault:
                raise ValueError(f"line {number} {fault}")
            yield row
    else:
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _question(rows: Iterable[dict[str, Any]], text_chars: int, run: int) -> dict[str, Any]:
    """One attempt at a question, out of the rows that bear its uid."""
    question = next((row for row in rows if row["role"] == "questioner"), None)
    answers = [row for row in rows if row["role"] == "responder"]
    judgments: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["role"] == "verifier":
            judgments[row["group"]].append(row)
    first = question or next(iter(rows))
    asked = None
    if question:
        asked = _sample(question, text_chars) | {
            "text": question["prediction"],
            "prompt": _shorten(question["prompt"], text_chars),
            "documents": question["document_ids"],
        }
    return {
        "run": run,
        "step": first["step"],
        "uid": first["uid"],
        "task": first["task"],
        "cluster": first["cluster_id"],
        "outcome": first.get("outcome") or _older_outcome(question, answers),
        "reference": first["reference"],
        "question": asked,
        "documents": answers[0]["document_ids"] if answers else [],
        "responder_prompt": _shorten(answers[0]["prompt"], text_chars) if answers else None,
        "answers": [
            _sample(answer, text_chars)
            | {
                "prediction": answer["prediction"],
                "rule": answer["rule_score"],
                "verdict": answer["verdict"],
                # the verifier's groups bear the number of the answer
                "judgments": [
                    _sample(row, text_chars // MAX_JUDGMENT_SHARE) | {"vote": row["verdict"]}
                    for row in judgments[f"{first['uid']}/{index}"]
                ],
            }
            for index, answer in enumerate(answers)
        ],
    }


def _sample(row: dict[str, Any], text_chars: int) -> dict[str, Any]:
    return {
        "reward": _number(row["reward"]),
        "advantage": _number(row["advantage"]),
        "output": _shorten(row["output"], text_chars),
        "tokens": row["response_tokens"],
        "prompt_tokens": row["prompt_tokens"],
        "truncated": row["truncated"],
    }


def _older_outcome(question: dict[str, Any] | None, answers: Sequence[dict[str, Any]]) -> str:
    """How an attempt ended, as far as the rows of files tell that were written before rows had an `outcome`."""
    kind = question["kind"] if question else "good"
    if kind in ("bad_format", "bad_ground"):
        return "ungrounded" if kind == "bad_ground" else kind
    rewards = {answer["reward"] for answer in answers}
    if not rewards:
        return "dropped"
    if len(rewards) > 1:
        return "mixed"
    return "all_1" if rewards == {1.0} else "all_0"


def _shorten(text: str, limit: int) -> str:
    """A text without its middle if it is longer than `limit` characters, and how much is missing."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[len(text) - limit + head :]}"


# ------------------------------------------------------------------------------------------- page


def render(
    runs: Sequence[Run],
    evaluations: Sequence[dict[str, Any]],
    questions: Sequence[dict[str, Any]],
    text_chars: int,
) -> str:
    """The page about these runs, evaluations and transcripts."""
    names = {name: None for run in runs for name in run.metrics}
    tasks = list(
        {match[1]: None for name in names if (match := re.match(r"(?:selfplay|validation)/(\w+)/(?:rate|pass@)", name))}
    )
    data = {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "steps": run.steps,
                "planned": run.planned,
                "first_time": run.first_time,
                "last_time": run.last_time,
                "facts": {key: run.settings.get(key) for key in ("model.path", "data.documents", "run.seed")},
                "metrics": run.metrics,
                "notes": run.notes,
            }
            for run in runs
        ],
        "evaluations": evaluations,
        "evaluation_columns": columns(evaluations),
        "sections": [asdict(section) for section in sections(tasks, names)],
        "table": [asdict(row) for row in table(names)],
        "settings": _differences(runs),
        "outcomes": outcome_labels(),
        "text_chars": text_chars,
        "judgment_chars": text_chars // MAX_JUDGMENT_SHARE,
        "written": time.time(),
    }
    files = {file.name: file.read_text(encoding="utf-8") for file in PAGE.iterdir()}
    style = files["uPlot.min.css"] + files["page.css"]
    script = "\n".join(files[name] for name in SCRIPTS)
    shown = [run.name for run in runs] + [evaluation["name"] for evaluation in evaluations]
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape("SPELL report: " + ", ".join(shown)),
        "licence": files["uPlot-LICENSE.txt"].strip(),
        "style": style,
        "script": script,
        "data": _pack(data),
        "transcripts": _pack(questions),
    }
    # in one pass: what is put in is not searched for further places
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], files["page.html"])


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Settings in which the runs differ: [key, value of the first run, of the second, …]."""
    keys = {key: None for run in runs for key in run.settings if key not in ("run.name", "run.output_dir")}
    rows = [[key, *(str(run.settings.get(key, "–")) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _pack(value: Any) -> str:
    """JSON, compressed, in letters that mean nothing in HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "backslashreplace"), 6, mtime=0)).decode()
