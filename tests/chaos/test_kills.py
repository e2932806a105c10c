"""Deaths and stops at chosen moments of a step: each is told in a sentence, leaves nothing behind, and a resume gives
the batches and weights of a run that nothing has disturbed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_fixtures import open_engines
from held_run import MOMENTS, HeldRun
from small_run import ROOT, SMALL, finished, metrics, same_steps, same_weights, servers, weights

from spell_megatron.config.reading import load_config

pytestmark = [pytest.mark.slow, pytest.mark.engine]

STEPS = 4
TINY = (*SMALL[:-2], f"--run.steps={STEPS}", "--checkpoint.every=1", "--validation.limit=4", "--validation.samples=1")
TWO = ("--training.parallel.processes=2", "--training.tokens_per_microbatch=256")  # rows are soon enough for both
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spell_megatron")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Words that attach a run to an engine which serves one run after the other, and its key."""
    config = load_config(ROOT / "examples" / "quickstart.yaml", [*SMALL])
    with open_engines(config, tmp_path_factory.mktemp("engine")) as engines:
        yield f"--rollout.urls=[{engines.urls[0]}]", engines.api_key
        assert engines.engines[0].healthy()


@pytest.fixture
def begin(engine, tmp_path):
    """begin(*words, attached=True, **options): the run of this test, new or resumed."""
    folder = tmp_path / "run"

    def start(*words: str, attached: bool = True, **options: object) -> HeldRun:
        if attached:
            words, options = (*words, engine[0]), {"SPELL_API_KEY": engine[1], **options}
        if (folder / "checkpoints" / "latest").exists():
            return HeldRun(folder, "--resume", str(folder), *words, **options)
        where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}")
        return HeldRun(folder, "--config", "examples/quickstart.yaml", *where, *TINY, *words, **options)

    return start


@pytest.fixture(scope="module")
def calm(engine, tmp_path_factory) -> Path:
    """Folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("runs")
    where = (f"--run.output_dir={folder}", "--run.name=calm")
    output = finished("--config", "examples/quickstart.yaml", *where, *TINY, engine[0], SPELL_API_KEY=engine[1])
    assert "Updates begin during their rollouts" in output
    return folder / "calm"


def same(calm: Path, folder: Path) -> None:
    same_steps(calm, folder, STEPS)
    assert same_weights(weights(calm, STEPS), weights(folder, STEPS))


def stop(run: HeldRun, step: int) -> None:
    """`spell stop` while the trainer accumulates rows of this step."""
    with run.held(step, "accumulation"):
        words = [sys.executable, "-m", "spell_megatron", "stop", str(run.folder)]
        asked = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while not (run.folder / "stop").exists():
            assert asked.poll() is None
            time.sleep(0.05)
    status, said = run.ended()
    assert status == 0 and f"stopped after step {step - 1} of {STEPS}" in said, said
    told, _ = asked.communicate()
    assert asked.returncode == 0 and "stopped" in told


def test_the_process_for_self_play_is_killed(begin, calm):
    for step, moment in enumerate(MOMENTS, start=2):
        run = begin()
        with run.held(step, moment):
            run.selfplay().kill()
        status, said = run.ended()
        assert status == 1 and "process for self-play" in said and "killed by signal 9" in said, said
        assert "Resume the run" in said and "Traceback" not in said
        assert sorted(metrics(run.folder)) == list(range(step))
    run = begin()
    assert run.ended()[0] == 0
    same(calm, run.folder)


def test_what_a_run_survives(begin, calm):
    """A SIGTERM that only the process for self-play gets, whose requests to stop are rank 0's; the death of an engine
    of whose answers some have been accumulated."""
    run = begin(attached=False)
    for step, moment in enumerate(MOMENTS, start=1):
        with run.held(step, moment):
            run.selfplay().terminate()
    with run.held(STEPS, "accumulation"):
        servers(run.process)[0].kill()
    status, said = run.ended()
    assert status == 0 and "started again" in said, said
    same(calm, run.folder)


def test_a_run_is_killed_and_stopped_while_it_accumulates(begin, calm):
    run = begin(attached=False)
    with run.held(2, "accumulation"):
        run.process.kill()
    assert run.ended()[0] == -9
    stop(begin(), 3)
    assert begin().ended()[0] == 0
    same(calm, run.folder)


def test_ranks_and_launchers_are_killed_while_they_accumulate(begin, calm):
    """Of a trainer of two processes, which torchrun has started, or the run itself."""
    run = begin(TWO[1], program=TORCHRUN)
    with run.held(2, "accumulation"):
        run.ranks()[1].kill()
    status, said = run.ended()
    assert status == 1 and "connection to another process of the trainer is lost" in said, said
    run = begin(*TWO)
    with run.held(2, "accumulation"):
        run.ranks()[1].kill()
    status, said = run.ended()
    assert status == 137 and "connection to another process of the trainer is lost" in said, said
    assert "Process 1 of the trainer" in said and "Traceback" not in said
    run = begin()
    with run.held(3, "accumulation"):
        run.process.kill()
    assert run.ended()[0] == -9
    stop(begin(program=TORCHRUN), 4)
    assert begin(program=TORCHRUN).ended()[0] == 0
    same(calm, run.folder)


def test_an_update_that_is_skipped_changes_nothing(begin):
    """Its gradient, which overflows, has been accumulated in part during the rollout."""
    run = begin("--run.steps=1")
    assert run.ended()[0] == 0
    folder = run.folder
    run = begin("--run.steps=3", "--training.role_weights.responder=1e30")
    status, said = run.ended()
    assert status == 0 and "done after 3 steps, 2 of them without an update" in said, said
    for step in (2, 3):
        assert metrics(folder)[step]["train/skipped"] == 1 and metrics(folder)[step]["time/hidden"] > 0
        assert all((weights(folder, 1)[name] == weight).all() for name, weight in weights(folder, step).items())
    assert begin("--run.steps=4", "--training.role_weights.responder=1").ended()[0] == 0
    last = metrics(folder)[4]
    assert last["train/skipped"] == 0 and last["train/grad_norm"] < 100 and last["train/mismatch_abs"] < 1e-4
