"""Processes that are killed at random, and many steps: nothing is lost, and nothing grows."""

import itertools
import random
import shutil
import statistics
import time
from pathlib import Path

import psutil
import pytest
from small_run import SMALL, command, finished, left_over, metrics, same_steps, servers, start

pytestmark = [pytest.mark.slow, pytest.mark.engine]

KILLS, STEPS = 10, 30
SOAK_STEPS = 200
CONNECTIONS = 8
"""Requests of the soak that are under way at once, each of which may have a connection of its own."""


def rows(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def parts(process: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The processes of a run by what they do."""
    everything = process.children(recursive=True)
    engines = [p for p in everything if "--port" in command(p)]
    return {
        "launcher": [process],
        "trainer": [p for p in process.children() if "train" in command(p)],
        "self-play": [p for p in everything if "spell_megatron.director.process" in command(p)],
        "engine server": engines,
        "engine core": [p for engine in engines for p in engine.children() if "EngineCore" in p.name()],
    }


@pytest.mark.parametrize("seed", [0])
def test_ten_kills(tmp_path, seed):
    """Of the launcher, either trainer process, the process for self-play, the engine's server or its core; a run that
    has ended is resumed, as the script of a job does. Batches and updates are those of a run that nothing disturbs."""
    two = ("--training.parallel.processes=2", f"--run.steps={STEPS}", "--checkpoint.every=1")
    base = ("--config", "examples/quickstart.yaml", f"--run.output_dir={tmp_path}", *SMALL, *two)
    finished(*base, "--run.name=calm")
    folder, chance = tmp_path / "wild", random.Random(seed)
    killed: list[str] = []
    process = start(*base, "--run.name=wild")
    before = 0
    while True:
        while process.poll() is None and (rows(folder) <= before or len(killed) == KILLS):
            time.sleep(0.05)
        if process.poll() is None:
            before = rows(folder)
            time.sleep(chance.uniform(0, 4))
            alive = {kind: found for kind, found in parts(psutil.Process(process.pid)).items() if found}
            kind = chance.choice(sorted(alive))
            chance.choice(alive[kind]).kill()
            killed.append(f"{kind} in step {before}")
            continue
        output, errors = process.communicate()
        if process.returncode == 0:
            break
        assert len(killed) <= KILLS, output[-2000:] + errors[-2000:]
        deadline = time.monotonic() + 60  # what is left of it ends by itself
        while left := left_over():
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
        if (folder / "checkpoints" / "latest").exists():
            process = start("--resume", str(folder))
        else:
            shutil.rmtree(folder)
            process = start(*base, "--run.name=wild")
        before = 0 if not folder.exists() else rows(folder)
    print("killed:", ", ".join(killed))
    assert len(killed) == KILLS
    same_steps(tmp_path / "calm", folder, STEPS)
    finished("--resume", str(folder), f"--run.steps={STEPS + 1}")  # the last checkpoint loads
    assert sorted(metrics(folder)) == list(range(STEPS + 2))


def test_soak(tmp_path):
    """Memory, file handles, threads and processes of trainer, self-play and engine over many steps."""
    small = ("--selfplay.groups=1", "--selfplay.group_size=2", "--selfplay.clusters_per_round=4")
    # Pages of the KV cache are taken from the system when they are first used, so it must be small to be full soon.
    small += ("--rollout.cpu_kv_cache_gib=0.03",)
    # The policy stays as it is: one that learned from two answers a step would soon answer nothing.
    small += ("--training.optimizer.lr=1e-6",)
    small += (
        f"--rollout.concurrency={CONNECTIONS}",
        f"--run.steps={SOAK_STEPS}",
        "--checkpoint.every=20",
        "--validation.every=0",
        "--validation.limit=4",
    )
    folder = tmp_path / "soak"
    where = (f"--run.output_dir={tmp_path}", "--run.name=soak")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL, *small)
    samples: dict[str, list[tuple[int, int, int]]] = {"trainer": [], "self-play": [], "server": [], "core": []}
    counts = []
    seen = 0
    while process.poll() is None:
        if rows(folder) > seen and rows(folder) % 10 == 0:
            seen = rows(folder)
            trainer = psutil.Process(process.pid)
            (selfplay,) = parts(trainer)["self-play"]
            (server,) = servers(process)
            (core,) = (p for p in server.children() if "EngineCore" in p.name())
            for name, one in zip(samples, (trainer, selfplay, server, core), strict=True):
                samples[name].append((one.memory_info().rss, one.num_fds(), one.num_threads()))
            counts.append(len([p for p in trainer.children(recursive=True) if p.name() != "sleep"]))
        time.sleep(0.02)
    output, errors = process.communicate()
    assert process.returncode == 0, output[-2000:] + errors[-2000:]
    assert sorted(metrics(folder)) == list(range(SOAK_STEPS + 1))
    for name, values in samples.items():
        megabytes, handles, threads = ([value[i] // (10**6 if i == 0 else 1) for value in values] for i in range(3))
        print(f"{name}: MB {megabytes}, file handles {handles}, threads {threads}")
        late = slice(len(values) // 2, None)
        # Memory grows in jumps as kernels meet new sizes of batches; what leaks in each step grows in all of them.
        growth = [after - before for before, after in itertools.pairwise(megabytes[late])]
        assert statistics.median(growth) <= 2, (name, growth)
        early = slice(len(values) // 4, len(values) // 2)
        assert max(handles[late]) <= max(handles[early]) + CONNECTIONS and max(threads[late]) <= max(threads[early]) + 3
    assert max(counts[len(counts) // 2 :]) <= max(counts[: len(counts) // 2])
