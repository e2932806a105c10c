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
from pathlib import Path
from typing import Any

from spell_megatron.report.comparison import table
from spell_megatron.report.evaluations import columns
from spell_megatron.report.outcomes import funnel, outcome_labels
from spell_megatron.report.panels import sections
from spell_megatron.report.runs import Run
from spell_megatron.report.transcripts import MAX_JUDGMENT_SHARE

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
