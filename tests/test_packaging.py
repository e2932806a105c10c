"""The wheel, away from the repository: what a user of pip has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from small_run import ROOT

import spell_megatron

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "spell_megatron", "examples")
BUILD = "import setuptools.build_meta as b; b.build_wheel('..'); b.build_sdist('..')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist") / "sources"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "evidence")
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder.parent


def test_the_wheel_brings_the_quick_start(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def spell(*words: str) -> str:
        command = [sys.executable, "-m", "spell_megatron", *words]
        done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    spell("init", "--example", "quickstart")
    printed = spell("train", "quickstart/run.yaml", "--dry-run")
    assert "# documents    15,938 in 2,000 clusters" in printed and str(ROOT) + "/" not in printed.replace(
        sys.prefix, ""
    )


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## \[([\d.]+)\] – (\w+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert spell_megatron.__version__ == newest[1] + (".dev0" if newest[2] == "unreleased" else "")


def test_processes_of_tests_run_this_checkout(tmp_path):
    code = "import spell_megatron; print(spell_megatron.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout).is_relative_to(ROOT)


def test_the_description_has_no_dead_links_and_the_licence_is_named(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Author"]
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2509.23863"]
    assert "](docs/" not in metadata.get_payload() and "# spell_megatron" in metadata.get_payload()


def test_the_sdist_makes_the_same_wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel, tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed <= inside | {f"spell_megatron/{name}" for name in inside}


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda form: form.stem
)
def test_forms_for_issues_have_what_a_forge_asks_for_and_name_files_that_exist(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    assert all(
        field["type"] == "textarea" and field["id"] and field["attributes"]["label"] for field in content["body"]
    )
    named = re.findall(r"(?:docs|examples)/[\w./]*\w", form.read_text())
    assert named and all((ROOT / name).exists() for name in named)
