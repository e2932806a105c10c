"""Runs of the quick start, cut down to seconds a step, as processes of their own; for the tests."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
MARK = uuid.uuid4().hex  # in the environment of every process that these tests start
SMALL = (
    "--selfplay.groups=6",
    "--selfplay.group_size=4",
    "--selfplay.clusters_per_round=20",
    "--selfplay.verifier.votes=3",
    "--rollout.concurrency=64",
    "--rollout.threads=1",
    "--rollout.cpu_kv_cache_gib=0.25",
    "--training.threads=1",
    "--training.tokens_per_microbatch=1024",
    "--checkpoint.every=2",
    "--validation.limit=10",
)


def start(*arguments: str, program: Sequence[str] = ("-m", "spell_megatron"), **environment: str) -> subprocess.Popen:
    """Start `spell train`; `program`: what Python runs, such as torchrun with the module."""
    return subprocess.Popen(
        [sys.executable, *program, "train", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SPELL_TEST": MARK} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    process = start(*arguments, **environment)
    stdout, stderr = process.communicate(timeout=3600)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def finished(*arguments: str, **environment: str) -> str:
    process = train(*arguments, **environment)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def command(process: psutil.Process) -> list[str]:
    """Its command line; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # or is a zombie
        return []


def servers(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "--port" in command(child)]


def signal_all(process: subprocess.Popen, number: int) -> None:
    """Send a signal to every process of a run, the helpers first, as Slurm sends it to every process of a step."""
    run = psutil.Process(process.pid)
    for one in [*reversed(run.children(recursive=True)), run]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") == step + 1):
        time.sleep(0.05)


def spell(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spell_megatron", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def metrics(run: Path) -> dict[int, dict]:
    """Metrics by step; every step must be there once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row for row in rows}


def dump(run: Path, step: int) -> list[dict]:
    with (run / "rollouts" / f"step_{step:06d}.jsonl").open(encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def weights(run: Path, step: int) -> dict:
    """The tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step_{step:06d}" / "hf" / "model.safetensors")


def same_weights(one: dict, two: dict) -> bool:
    """Up to rounding. Single weights may differ by more: Adam's first steps have the size of the rate however small a
    gradient is."""
    assert one.keys() == two.keys()
    difference = sum((one[name] - two[name]).square().sum().item() for name in one)
    return difference < (1e-5) ** 2 * sum(weight.square().sum().item() for weight in one.values())


def same_steps(one: Path, two: Path, steps: int, mismatch: float = 1e-4) -> None:
    """Both runs trained on the same questions, with the same result, and engines and trainer agree up to `mismatch`."""
    for step in range(1, steps + 1):
        questions = ([r for r in dump(run, step) if r["role"] == "questioner"] for run in (one, two))
        first, second = ([(r["uid"], r["cluster_id"], r["prompt"], r["output"]) for r in q] for q in questions)
        assert first == second
        for name in ("train/grad_norm", "train/response_tokens", "train/entropy"):
            assert metrics(two)[step][name] == pytest.approx(metrics(one)[step][name], rel=1e-4), (step, name)
        assert metrics(two)[step]["train/mismatch_abs"] < mismatch


def started() -> Iterator[psutil.Process]:
    """The processes that these runs have started and that are still there."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("SPELL_TEST") == MARK:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue


def left_over() -> list[list[str]]:
    """Their command lines."""
    return [process.info["cmdline"] for process in started()]
