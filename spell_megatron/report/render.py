"""The page of the report: one HTML file that holds its data, style and scripts.

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
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from spell_megatron.encodings import printable
from spell_megatron.monitoring.status import silent
from spell_megatron.report.comparison import table
from spell_megatron.report.evaluations import columns
from spell_megatron.report.health import findings
from spell_megatron.report.outcomes import funnel, outcome_labels
from spell_megatron.report.panels import sections
from spell_megatron.report.runs import Run
from spell_megatron.report.timeline import timeline
from spell_megatron.report.timing import timing
from spell_megatron.report.transcripts import MAX_JUDGMENT_SHARE, shorten
from spell_megatron.report.verdict import verdict

FACTS = ("model.path", "data.documents", "run.seed")
"""Settings that the card of a run names."""

OWN = ("run.name", "run.output_dir")
"""Settings in which runs always differ."""

AXES = {
    "steps": "steps",
    "time": "time at work",
    "generated": "tokens generated",
    "trained": "tokens trained on",
}
"""What the plots of runs may have below them."""

PAGE = Path(__file__).with_name("page")
SCRIPTS = (
    "uPlot.iife.min.js",
    "elements.js",
    "numbers.js",
    "axes.js",
    "download.js",
    "reach.js",
    "plots.js",
    "timeline.js",
    "overview.js",
    "evaluations.js",
    "transcripts.js",
    "page.js",
)
"""Scripts in the order in which the page runs them."""


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
    settings = _settings(runs)
    data = {
        "runs": [_about(run) for run in runs],
        "axes": AXES,
        "evaluations": evaluations,
        "evaluation_columns": columns(evaluations),
        "sections": [asdict(section) for section in sections(tasks, names)],
        "table": [asdict(row) for row in table(names)],
        "settings": [row for row in settings if len(set(row[1:])) > 1 and row[0] not in OWN],
        "all_settings": settings,
        "outcomes": outcome_labels(),
        "funnel": funnel(),
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
        "title": html.escape(_text("SPELL report: " + ", ".join(shown), 200)),
        "licence": files["uPlot-LICENSE.txt"].strip(),
        "style": style,
        "script": script,
        "data": _pack(data),
        "transcripts": _pack(questions),
    }
    # in one pass: what is put in is not searched for further places
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], files["page.html"])


def _about(run: Run) -> dict[str, Any]:
    """What the page shows of a run."""
    took = timing(run)
    times = [time for time in run.times if time is not None]
    state = run.status or {}
    return {
        "name": _text(run.name),
        "folder": _text(str(run.folder)),
        "steps": run.steps,
        "planned": run.planned,
        "state": "silent" if run.status and silent(run.status) else state.get("state"),
        "first_time": times[0] if times else None,
        "last_time": times[-1] if times else None,
        "seconds": took.seconds,
        "pauses": took.pauses,
        "set_back": took.set_back,
        "axes": _axes(run, took.seconds),
        "timeline": timeline(run.spans, set(run.steps)),
        "made": run.made,
        "verdict": asdict(verdict(run)),
        "question_set": _question_set(run),
        "findings": [asdict(finding) | {"text": shorten(finding.text, 1000)} for finding in findings(run)],
        "facts": {key: _text(run.settings[key]) for key in FACTS if key in run.settings},
        "versions": {_text(name): _text(version) for name, version in run.versions.items()},
        "metrics": run.metrics,
        "notes": run.notes,
    }


def _axes(run: Run, seconds: Sequence[float]) -> dict[str, list[float]]:
    """Where the steps stand on each axis of `AXES` that the run has measured; a step without a number adds nothing."""
    counted = {
        "time": seconds,
        "generated": [value or 0 for value in run.column("selfplay/generated_tokens")],
        "trained": [
            (value or 0) * (was is not False)
            for value, was in zip(run.column("train/tokens_unshared"), run.made, strict=True)
        ],
    }
    return {name: list(accumulate(amounts)) for name, amounts in counted.items() if any(amounts)}


def _question_set(run: Run) -> str | None:
    """What held-out questions a run had; runs of which this is equal can be compared. None: its folder does not say."""
    logged = [run.column(f"validation/{name}") for name in ("question_set", "questions")]
    sets = {pair for pair in zip(*logged, strict=True) if pair != (None, None)}
    names = [run.settings.get(f"validation.{name}") for name in ("questions", "limit", "samples")]
    if names[0] is None and not sets:
        return None
    return json.dumps([sorted(map(str, sets)), _text(names if not sets else names[2:])])


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """All settings: [key, value of the first run, of the second, …]."""
    keys = {key: None for run in runs for key in run.settings}
    return [[_text(key), *(_text(run.settings[key]) if key in run.settings else "–" for run in runs)] for key in keys]


def _text(value: Any, limit: int = 400) -> str:
    """A setting, a name or a path as the page shows it."""
    try:
        words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError):  # YAML can hold a list in itself, and keys of any kind
        words = str(value)
    return shorten(printable(words), limit)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _pack(value: Any) -> str:
    """JSON, compressed, in letters that mean nothing in HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "backslashreplace"), 6, mtime=0)).decode()
