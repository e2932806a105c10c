"""The environment for GPUs: what would be installed, in which order, and what a machine lacks for it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIRED_BY_OTHERS = {"nvidia-cutlass-dsl-libs-cu12"}  # nvidia-cutlass-dsl itself wants it, with CUDA 13 too


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "tools" / "setup_environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "tools" / "gpu-constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.fixture(scope="module")
def package() -> dict:
    """What setup.py says."""
    with mock.patch.object(setuptools, "setup") as setup:
        exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": ROOT / "setup.py"})
    return setup.call_args.kwargs


def test_torch_is_there_before_transformer_engine_is_compiled(script):
    commands = [arguments for _, arguments in script.gpu_commands()]
    with_torch = next(i for i, arguments in enumerate(commands) if "torch==2.13.0" in arguments)
    with_engine = next(i for i, arguments in enumerate(commands) if f"{ROOT}[gpu,dev]" in arguments)
    assert with_torch < with_engine
    # In a build environment of pip's own there would be another torch.
    assert "--no-build-isolation" in commands[with_engine]
    for arguments in (commands[with_torch], commands[with_engine]):
        assert arguments[arguments.index("--constraint") + 1] == str(ROOT / "tools" / "gpu-constraints.txt")


def test_the_pins_are_those_of_setup_py(package, pins):
    wanted = [Requirement(text) for text in package["install_requires"] + package["extras_require"]["gpu"]]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    exact = [Requirement(text) for text in package["extras_require"]["gpu"]]
    assert all(re.fullmatch(r"==[\d.]+", str(requirement.specifier)) for requirement in exact), exact
    assert pins["megatron-core"] == "0.19.2"


def test_nothing_is_for_another_cuda(package, pins):
    assert {name for name in pins if re.search(r"[-_]cu(?!13)\d+$", name)} <= REQUIRED_BY_OTHERS
    assert pins["transformer-engine-cu13"] == pins["transformer-engine-torch"] == pins["transformer-engine"]
    extras = {extra for text in package["extras_require"]["gpu"] for extra in Requirement(text).extras}
    # `pytorch` would let pip compile it against any torch; `core` and `core_cu12` are for CUDA 12.
    assert extras == {"core_cu13"}


@pytest.mark.parametrize(
    "release, fault",
    [(None, "There is no nvcc"), ("12.8", "is not of CUDA 13"), ("13.0", None)],
)
def test_it_names_what_the_machine_lacks(script, monkeypatch, tmp_path, release, fault):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if release:
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir()
        compiler.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.88\n")
        compiler.chmod(0o755)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    faults = list(script.gpu_faults("/usr/bin/python3.12", 100))
    assert len(faults) == (fault is not None) and all(fault in text for text in faults)


def test_it_names_every_fault_at_once(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(script, "find_python", lambda *_: None)
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    monkeypatch.setattr(script, "NEEDED_GB_GPU", 10**9)
    assert script.make_gpu(tmp_path / ".venv-gpu") == 2
    printed = capsys.readouterr().err
    assert all(what in printed for what in ("Python 3.12", "nvcc", "g++", "GB are needed"))
    assert not (tmp_path / ".venv-gpu").exists()


def test_the_container_makes_the_same_environment():
    recipe = (ROOT / "slurm" / "container.Dockerfile").read_text()
    assert re.search(r"^FROM nvidia/cuda:13\.[\d.]+-cudnn-devel-", recipe, re.M)
    assert "tools/setup_environment.py .venv-gpu" in recipe
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", recipe, re.M) for word in line.split()}
    assert all((ROOT / name).exists() for name in copied)


def test_environments_beside_torch_have_their_extras(script, package):
    assert set(script.ALONE) == {"slurm", "docs"}
    for extra in script.ALONE:
        assert script.requirements(extra) == package["extras_require"][extra]
    assert all("==" in wanted for wanted in script.requirements("docs"))
