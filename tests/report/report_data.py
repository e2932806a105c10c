"""Small folders of runs, and what a page holds."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

from spell_megatron.report.report import write_report


def write_run(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def record(step: int, **metrics: float | None) -> str:
    return json.dumps({"step": step, "time": 1795290427.5 + step} | metrics)


def embedded(page: str, name: str):
    """What the page holds under an id, unpacked."""
    letters = re.search(rf'<script type="application/gzip" id="{name}">([A-Za-z0-9+/=]*)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(letters)))


def data_of(folder: Path, out: Path) -> dict:
    write_report([folder], out, transcripts=0)
    return embedded(out.read_text(), "data")
