"""The suite for GPUs: that its scripts work, on a CPU; and all of it where there is a GPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks" / "gpu"
WITHOUT = """
import os, sys
class Without:
    def find_spec(self, name, *_):
        if name.split(".")[0] in os.environ["WITHOUT"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
"""
QUICK = """
import json, pathlib, sys, time
file = pathlib.Path(sys.argv[sys.argv.index("--result") + 1])
def part(name, **figures):
    result["figures"][name] = figures
    file.write_text(json.dumps(result))
result = {"started": ["one", "two"], "figures": {}}
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """What a machine gets: the files of the working tree, and no more."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("this is no working tree of git")
    folder = tmp_path_factory.mktemp("machine")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(folder: Path, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", folder / "benchmarks" / "gpu" / "run.sh", *options],
        env=own | {"PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize(
    "number, stage, parts",
    [
        (1, "correctness", 5),
        pytest.param(2, "engine", 3, marks=[pytest.mark.slow, pytest.mark.engine]),
        pytest.param(3, "trees", 8, marks=pytest.mark.slow),
        pytest.param(4, "mfu", 6, marks=pytest.mark.slow),
    ],
)
def test_a_stage_runs_with_tiny_sizes(bare, tmp_path, number, stage, parts):
    done = run(bare, tmp_path, "--tiny", "--only", stage, "--seconds", "1500")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / f"gpu-{number}-{stage}.json").read_text())
    assert result["holds"] and result["ended"] == "ended" and len(result["figures"]) == parts, result
    assert f"stage {number} {stage}: ended after" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["holds"]


def test_it_names_what_is_missing_and_measures_the_rest(bare, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    options = {"PYTHONPATH": str(tmp_path), "WITHOUT": "megatron vllm"}
    done = run(bare, tmp_path, "--tiny", "--only", "correctness", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bring the folder benchmarks/gpu/wheels along" in done.stderr
    assert "put the wheel of megatron-core into benchmarks/gpu/wheels" in done.stdout
    result = json.loads((tmp_path / "gpu-1-correctness.json").read_text())
    assert result["figures"]["logprobs"]["holds"]
    assert result["figures"]["update"]["missing"].startswith("megatron") and not result["holds"]


@pytest.fixture
def driver(monkeypatch, tmp_path) -> ModuleType:
    """run.py with stages that a test writes into a folder of its own."""
    spec = importlib.util.spec_from_file_location("gpu_suite_driver", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "HERE", folder)
    return module


def stages(driver: ModuleType, monkeypatch, out: Path, seconds: float, **codes: str) -> dict[str, dict]:
    """Results of stages with this code; all have the same share of the time."""
    monkeypatch.setattr(driver, "STAGES", dict.fromkeys(codes, 1))
    for name, code in codes.items():
        (driver.HERE / f"{name}.py").write_text(QUICK + code)
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", "--seconds", str(seconds), "--out", str(out)])
    driver.main()
    return {name: json.loads((out / f"gpu-{i}-{name}.json").read_text()) for i, name in enumerate(codes, 1)}


@pytest.mark.processes
def test_no_stage_keeps_another_from_its_result(driver, monkeypatch, tmp_path, capsys):
    results = stages(
        driver,
        monkeypatch,
        tmp_path / "out",
        seconds=24,
        hangs="part('one', holds=True)\ntime.sleep(1000)",
        crashes="part('one', holds=True)\nimport os; os.kill(os.getpid(), 11)",
        refuses="sys.exit('no such thing')",
        works="part('one', holds=True); part('two', holds=True, skipped='needs 2 GPUs')",
    )
    assert [result["holds"] for result in results.values()] == [False, False, False, True]
    assert results["hangs"]["ended"] == "cut off by its time limit of 6 s"
    assert results["crashes"]["ended"] == "failed with exit status -11"
    assert results["refuses"]["ended"] == "failed with exit status 1" and not results["refuses"]["figures"]
    assert all(results[name]["figures"]["one"]["holds"] for name in ("hangs", "crashes", "works"))
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("stage ") and ": " in line]) == 4
    assert any(line.endswith("all goals met; skipped: two (needs 2 GPUs)") for line in printed)
    assert json.loads(printed[-1])["holds"] is False


@pytest.mark.processes
def test_a_stage_that_is_cut_off_leaves_no_process(driver, monkeypatch, tmp_path):
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\npart('one', holds=True, child=child.pid)\n"
    results = stages(driver, monkeypatch, tmp_path / "out", seconds=5, hangs=code + "time.sleep(1000)")
    child = results["hangs"]["figures"]["one"]["child"]
    assert psutil.wait_procs(processes(child), timeout=60)[1] == []  # it was killed; a busy machine needs a moment


def processes(number: int) -> list[psutil.Process]:
    """The process of this number, if there is one that has not ended."""
    try:
        process = psutil.Process(number)
        return [] if process.status() == psutil.STATUS_ZOMBIE else [process]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.processes
def test_a_stage_gets_the_time_that_the_one_before_left(driver, monkeypatch, tmp_path):
    slow = "time.sleep(6)\npart('one', holds=True)"  # longer than its own share
    results = stages(driver, monkeypatch, tmp_path / "out", seconds=10, quick="part('one', holds=True)", slow=slow)
    assert results["slow"]["holds"]


def test_experts_are_compared_where_transformer_engine_is_installed(monkeypatch):
    """It has experts of another class, but the two kinds that are compared are for machines without it."""
    monkeypatch.syspath_prepend(HERE)
    import correctness
    import suite

    from spell_megatron.training import backend, model

    monkeypatch.setattr(model, "_has_transformer_engine", lambda: True)
    suite.initialise.cache_clear()
    try:
        assert correctness.experts(tiny=True)["holds"]
    finally:
        backend.shutdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_is_skipped(bare, tmp_path):
    done = run(bare, tmp_path)
    assert done.returncode == 3 and "torch sees no GPU" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_goals_hold(bare, tmp_path):
    done = run(bare, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["holds"], done.stdout
