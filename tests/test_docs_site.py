"""The site of `make docs`: its pages lead to each other, and what they quote is in the code.

All but one of these tests read the pages as text. That one makes the site, where Sphinx is installed.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from test_docs import ROOT, anchors

sys.path.insert(0, str(ROOT / "tools"))

import docs_reference
import docs_site

from spell_megatron.monitoring.glossary import MEANINGS
from spell_megatron.report.health import CONDITIONS
from spell_megatron.selfplay.outcomes import Outcome

TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """The folder that Sphinx reads."""
    folder = tmp_path_factory.mktemp("site") / "pages"
    docs_site.write_pages(folder)
    return folder


def test_links_lead_somewhere(pages):
    missing = []
    for page in pages.rglob("*.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if re.match(r"https?:", link):
                continue
            if not target.is_file() or (anchor and anchor not in anchors(target)):
                missing.append(f"{link} in {page.relative_to(pages)}")
    assert not missing


def test_every_page_stands_in_the_contents(pages):
    listed = {docs_site.as_index(page) for part in docs_site.CONTENTS.values() for page in part}
    assert listed == {page.relative_to(pages).as_posix() for page in pages.rglob("*.md")}


def test_settings_metrics_and_commands_are_made_from_the_code(pages):
    settings, cluster, metrics, commands = (
        (pages / docs_reference.FOLDER / f"{name}.md").read_text(encoding="utf-8")
        for name in ("settings", "cluster_file", "metrics", "commands")
    )
    assert "### `rollout.sampling.temperature`\n\n`number`, default `0.7`\n\nSampling temperature" in settings
    assert "### `model.path`\n\n`path`, required\n" in settings
    assert "## `container.image`\n" in cluster
    assert "before clipping ([`training.optimizer.clip_grad`](settings.md#trainingoptimizerclip_grad))" in metrics
    shown = [name for name in MEANINGS if not name.startswith("selfplay/<task>/")]
    assert all(f"| `{name}` | " in metrics for name in shown)
    assert re.findall(r"^## `spell (\w+)`$", commands, re.MULTILINE) == list(docs_reference.commands())
    assert "| `--text-column NAME` | " in commands and "longer than `--max-document-chars`, do not" in commands
    assert "short for [`--logging.level`](settings.md#logginglevel): what" in commands
    assert not (ROOT / docs_reference.FOLDER).exists()


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """Every text that the code holds, with `…` for what is filled in."""
    found = []
    for file in [*(ROOT / "spell_megatron").rglob("*.py"), ROOT / "tools" / "setup_environment.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(re.sub(r"{[a-z]\w*[^{}]*}", "…", " ".join(text.split())) for text in found)


def in_the_code(quote: str) -> bool:
    """Whether the pieces of a quote around its `…` stand in one text of the code, in this order."""
    pieces = [re.escape(piece.strip()) for piece in quote.split("…") if piece.strip(" .:,")]
    return any(re.search(".*?".join(pieces), text) for text in texts_of_the_code())


def test_messages_are_quoted_as_they_are():
    quotes = re.findall(r"^> `(.+)`$", TROUBLESHOOTING, re.MULTILINE)
    assert len(quotes) > 50 and len(set(quotes)) == len(quotes)
    assert not [quote for quote in quotes if not in_the_code(quote)]
    assert not in_the_code("… is no message of … that exists")


def test_every_end_of_an_attempt_and_every_finding_of_the_report_has_an_entry():
    rows = re.findall(r"^\| `(\w+)` \| `(.+)` \| .+ \|$", TROUBLESHOOTING, re.MULTILINE)
    assert rows == [(outcome.value, outcome.meaning) for outcome in Outcome]
    findings = re.findall(r"^\| `([A-Z].+?)` \| .+ \| .+ \|$", TROUBLESHOOTING, re.MULTILINE)
    assert findings == sorted(findings, key=[condition.title for condition in CONDITIONS].index)
    assert len(findings) == len(CONDITIONS)


def test_the_site_is_made_without_a_warning_and_needs_no_network(pages, tmp_path):
    sphinx = ROOT / ".venv-docs" / "bin" / "sphinx-build"
    program = str(sphinx) if sphinx.exists() else shutil.which("sphinx-build")
    if program is None:
        pytest.skip("no Sphinx: `make environment-docs` installs it into .venv-docs")
    site = tmp_path / "site"
    command = [
        program,
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        "--conf-dir",
        ROOT / "docs" / "site",
        pages,
        site,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (site / "index.html").is_file() and (site / "docs" / "reference" / "settings.html").is_file()
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = file.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"([^\"]+)", text)
        fetched += re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")]+)", text)
        assert not [address for address in fetched if re.match(r"//|https?:", address)], file
