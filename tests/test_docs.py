"""The Markdown pages: relative links lead somewhere, and paths of this repository that they name exist."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(path for path in (ROOT / "examples").rglob("README.md") if "policy" not in path.parts),
]
FOLDERS = ("benchmarks", "docs", "examples", "slurm", "spell_megatron", "tests", "tools")


@cache
def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_holds_two_versions(page):
    assert not re.findall(r"^(?:<<<<<<<|>>>>>>>).*$", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"https?:", link):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text):
        made_later = "/NAME" in path
        if not made_later and not (ROOT / path).exists():
            missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_written_for_an_active_environment(page):
    """`spell` and `python`, not `.venv/bin/spell`; what submits jobs has an environment of its own, `.venv-slurm`."""
    assert not re.findall(r".*\.venv/bin/(?!activate).*", page.read_text(encoding="utf-8"))
