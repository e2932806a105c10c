#!/usr/bin/env python3
"""Put together the pages of `make docs`: those of the repository as they are, and those made from the code.

usage: docs_site.py FOLDER

FOLDER gets the README, the pages of docs/ and whatever they link to, in the repository's own folders, so that links
lead where they lead in the repository. sphinx-build with docs/site/conf.py makes a site of it.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from docs_reference import reference_pages  # noqa: E402

CONTENTS = {
    "Start": {
        "README.md": "Quick start",
        "docs/first_run.md": "Your first real run",
        "examples/quickstart/README.md": "What the quick start learns",
        "docs/glossary.md": "Glossary",
    },
    "Guide": {
        "docs/documents.md": "Documents",
        "docs/running.md": "Runs",
        "docs/evaluation.md": "Evaluation",
        "docs/report.md": "Report",
        "docs/extending.md": "Code of your own",
        "docs/troubleshooting.md": "Troubleshooting",
    },
    "Scale": {
        "docs/long_context.md": "Long context",
        "docs/parallel.md": "Layouts and weights",
        "docs/recipes.md": "The paper's models",
        "docs/cluster.md": "Slurm",
    },
    "Reference": {
        "docs/reference/settings.md": "Settings",
        "docs/reference/commands.md": "Commands",
        "docs/reference/metrics.md": "Metrics",
        "docs/reference/cluster_file.md": "The cluster's file",
    },
    "Background": {
        "docs/algorithm.md": "Algorithm",
        "docs/verification.md": "Verification",
        "docs/evidence.md": "Evidence",
        "examples/evidence/rich/README.md": "The rich world",
        "examples/evidence/smollm2/README.md": "SmolLM2",
    },
    "Project": {
        "docs/architecture.md": "Architecture",
        "CONTRIBUTING.md": "Contributing",
        "CHANGELOG.md": "Changelog",
    },
}
"""What stands beside every page: part -> page -> its short title."""


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    write_pages(Path(sys.argv[1]))
    return 0


def write_pages(folder: Path) -> None:
    """Write all pages, and the files that they show or link to, into a folder, in the place of what it held."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in sources():
        place = folder / as_index(file.as_posix())
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            text = re.sub(
                r"(?<=\]\()[^)\s]+", lambda link: as_index(link[0]), (ROOT / file).read_text(encoding="utf-8")
            )
            place.write_text(text + (contents() if file.as_posix() == "README.md" else ""), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / file, place)
    for name, text in reference_pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def as_index(path: str) -> str:
    """A README is the first page of its folder."""
    return re.sub(r"\bREADME\.md", "index.md", path) if "://" not in path else path


def contents() -> str:
    """The contents as Sphinx reads them."""
    parts = []
    for part, pages in CONTENTS.items():
        names = {page: "self" if page == "README.md" else f"/{as_index(page).removesuffix('.md')}" for page in pages}
        rows = [f"{title} <{names[page]}>" for page, title in pages.items()]
        parts.append("\n".join(["", "```{toctree}", ":hidden:", f":caption: {part}", "", *rows, "```", ""]))
    return "".join(parts)


def sources() -> list[Path]:
    """Files of the repository that the site holds, relative to it: pages, what they link to, and what those link to."""
    waiting = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop().resolve()
        if file in found or not file.is_file() or not file.is_relative_to(ROOT):
            continue
        found.add(file)
        if file.suffix == ".md":
            waiting += [file.parent / link for link in links(file.read_text(encoding="utf-8"))]
    return sorted(file.relative_to(ROOT) for file in found)


def links(text: str) -> list[str]:
    """Paths of the relative links of a page, without anchors."""
    every = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link.partition("#")[0] for link in every if not re.match(r"\w+:|#", link)]


if __name__ == "__main__":
    sys.exit(main())
