#!/usr/bin/env python3
"""Fetch the Python files of packages that only install on machines with GPUs: what `make test-contracts` reads.

usage: fetch_contract_sources.py [PACKAGE ...]

The packages are `fla-core`, `transformer-engine` and `vllm` (its build for CUDA), in the versions that the extra `gpu`
of setup.py asks for. `.venv-contracts/PACKAGE/` gets the Python files and the metadata of its wheel, and can be put on
`sys.path`. Compiled files are left out, and so is all that the packages depend on. The script downloads a wheel once
(vLLM's has half a GB), with pip of the Python that runs it and from the index that pip is configured for, and removes
it afterwards. It does nothing for a package that is there in the wanted version.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-contracts"
PACKAGES = ("fla-core", "transformer-engine", "vllm")


def main():
    names = sys.argv[1:] or PACKAGES
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        return fail(f"There is no package {', '.join(unknown)}; there are {' and '.join(PACKAGES)}.")
    for name in names:
        if status := fetch(name, wanted(name)):
            return status
    return 0


def wanted(name):
    """What setup.py asks for of a package, such as `vllm==1.2`."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    text = text.replace("{VLLM}", re.search(r'VLLM = "(.+)"', text).group(1))
    return name + re.search(rf'"{name}(?:\[.*?\])?([=<>~].*?)"', text).group(1)


def fetch(name, requirement):
    """Unpack the Python files of a package; returns the exit status."""
    folder = FOLDER / name
    stamp = folder / "requirement"  # written last: it marks a complete folder
    if stamp.exists() and stamp.read_text() == requirement:
        return 0
    print(f"Fetching the Python files of {requirement} into {folder.relative_to(ROOT)}.", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as download:
        pip = [sys.executable, "-m", "pip", "--no-input", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command = [*pip, "--dest", download, requirement]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wheels = list(Path(download).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            return fail(f"pip could not download {requirement}:\n{done.stdout.strip()[-2000:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            files = [file for file in wheel.namelist() if file.endswith(".py") or ".dist-info/" in file]
            wheel.extractall(folder, files)
    stamp.write_text(requirement)
    return 0


def fail(message):
    print(f"fetch_contract_sources: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
