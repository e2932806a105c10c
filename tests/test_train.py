"""The whole loop on this machine: real engines, real trainer, the quick start's policy and documents.

Three runs are started once and looked at by all tests: an undisturbed one, one whose engine is killed and that is
stopped and resumed in its middle, and one whose trainer is spread over two processes.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from engine_fixtures import open_engines
from small_run import (
    ROOT,
    SMALL,
    command,
    dump,
    finished,
    left_over,
    metrics,
    same_steps,
    same_weights,
    servers,
    signal_all,
    spell,
    start,
    train,
    wait_for_step,
    weights,
)

from spell_megatron.config.reading import load_config
from spell_megatron.report.comparison import table
from spell_megatron.report.panels import sections
from spell_megatron.report.timeline import read_timeline, steps_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run of four steps, with what it printed in output.txt."""
    folder = tmp_path_factory.mktemp("runs")
    where = (f"--run.output_dir={folder}", "--run.name=whole", "--run.steps=4")
    output = finished("--config", "examples/quickstart.yaml", *where, *SMALL)
    (folder / "whole" / "output.txt").write_text(output)
    return folder / "whole"


@pytest.fixture(scope="module")
def resumed(whole) -> Path:
    """The same run, resumed. An engine is killed in the generation of step 2, and all processes are signalled in that
    of step 4, as Slurm does before the time limit. What the first part printed is in output.txt. All this happens while
    the trainer is gone, as on shared GPUs, and its optimizer is in host memory."""
    folder = whole.parent / "resumed"
    where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}", "--run.steps=4")
    gone = ("--training.swap=all", "--training.optimizer.offload=true")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL, *gone)
    wait_for_step(process, folder, 1)
    time.sleep(0.5)
    (server,) = servers(process)
    server.kill()
    wait_for_step(process, folder, 3)
    signal_all(process, signal.SIGUSR1)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 75, output[-3000:] + errors[-3000:]
    assert (folder / "checkpoints" / "latest").read_text() == "step_000003"
    (folder / "output.txt").write_text(output)
    finished("--resume", str(folder))
    return folder


@pytest.fixture(scope="module")
def spread(whole) -> Path:
    """The first step of the same run with two data-parallel trainer processes."""
    where = (f"--run.output_dir={whole.parent}", "--run.name=spread", "--run.steps=1")
    settings = ("--training.parallel.processes=2", "--rollout.verify_weights=true", "--training.swap=all")
    finished("--config", "examples/quickstart.yaml", *where, *SMALL, *settings)
    return whole.parent / "spread"


def test_run_writes_metrics_dumps_and_checkpoints(whole):
    steps = metrics(whole)
    assert sorted(steps) == [0, 1, 2, 3, 4]
    assert {"validation/pass@1", "validation/pass@4"} <= steps[0].keys() & steps[4].keys()
    for step in (1, 2, 3, 4):
        assert steps[step]["selfplay/mixed_groups"] == 6
        assert steps[step]["batch/responder/rows"] == 24
        assert 0 < steps[step]["train/grad_norm"] < 100
        assert steps[step]["train/tokens_computed"] < steps[step]["train/tokens_unshared"] / 2
    assert list((whole / "tensorboard").glob("events.*"))
    assert (whole / "checkpoints" / "latest").read_text() == "step_000004"
    output = (whole / "output.txt").read_text()
    assert "step 4/4" in output and "pass@1" in output


def test_a_run_logs_what_the_report_plots(whole):
    logged = set().union(*metrics(whole).values())
    shown = sections(["doc_general_qa", "docmath_qa"], logged)
    curves = [c for section in shown for panel in section.panels for group in panel.groups.values() for c in group]
    plotted = {metric for curve in curves for metric in curve.metrics} | {row.metric for row in table(logged)}
    overlap = {"-time/hidden"}  # there are not enough cores for it
    mixture_of_experts = {"train/moe_load_imbalance", "train/moe_load_imbalance_max", "train/routing_changed"}
    of_gate = {metric for metric in plotted if metric.endswith("rate/gate_answers_reaching_reference")}
    assert plotted - logged <= mixture_of_experts | of_gate | overlap


def test_runs_record_what_trainer_and_engines_did(whole, resumed):
    """What a resumed run gave up, and made again, counts once."""
    for run in (whole, resumed):
        steps = steps_of(read_timeline(run))
        assert [step.step for step in steps] == [1, 2, 3, 4]
        for step in steps:
            names = [span.name for span in step.spans if span.name != "accumulate"]
            assert names[:2] == ["rollout", "update"] and set(names[2:]) <= {"checkpoint", "push", "validation"}
            assert all(step.start <= span.start <= span.end <= step.end for span in step.spans)


def test_engine_and_trainer_agree(whole):
    """fp32 at temperature 1: measured 1e-7 mean and 1.00001 at most; before a faulty push it is 0.1."""
    for step, row in metrics(whole).items():
        if step:
            assert row["train/mismatch_abs"] < 1e-4
            assert row["train/mismatch_max_ratio"] < 1.01


def test_dumps_tell_a_person_what_happened(whole):
    rows = dump(whole, 1)
    assert {row["role"] for row in rows} == {"questioner", "responder", "verifier"}
    answer = next(row for row in rows if row["role"] == "responder")
    for key in ("prompt", "output", "reward", "reference", "prediction", "document_ids", "uid"):
        assert answer[key] is not None, key
    assert answer["weight_version"] == "0"
    assert {row["weight_version"] for row in dump(whole, 3)} == {"2"}


def test_checkpoints_are_hugging_face_models_and_the_policy_moved(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = whole / "checkpoints" / "step_000004" / "hf"
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    early, late = weights(whole, 2), weights(whole, 4)
    assert early.keys() == late.keys()
    assert any((early[name] != late[name]).any() for name in early)


def test_resume_gives_identical_batches_history_and_weights(whole, resumed):
    for step in (3, 4):
        assert [(r["uid"], r["cluster_id"], r["prompt"]) for r in dump(whole, step) if r["role"] == "questioner"] == [
            (r["uid"], r["cluster_id"], r["prompt"]) for r in dump(resumed, step) if r["role"] == "questioner"
        ]
    one, two = ((run / "checkpoints" / "step_000004" / "state.json").read_text() for run in (whole, resumed))
    assert json.loads(one) == json.loads(two)
    assert same_weights(weights(whole, 4), weights(resumed, 4))
    assert sorted(metrics(resumed)) == [0, 1, 2, 3, 4]
    for name in ("validation/pass@1", "validation/pass@4"):
        assert metrics(resumed)[4][name] == pytest.approx(metrics(whole)[4][name], abs=0.05)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="trainer and engine need a core each")
def test_updates_begin_during_their_rollouts(whole, resumed):
    """Batches and weights are those of updates that wait, which the test of the resume compares."""
    assert "Updates begin during their rollouts" in (whole / "output.txt").read_text()
    assert sum(metrics(whole)[step]["time/hidden"] for step in (1, 2, 3, 4)) > 0
    assert "wait for the end of their rollouts: training.swap is all" in (resumed / "output.txt").read_text()
    for step in (1, 2, 3, 4):
        assert "time/hidden" not in metrics(resumed)[step]
        for name in ("train/response_tokens", "train/tokens_unshared", "batch/responder/rows", "batch/questioner/rows"):
            assert metrics(whole)[step][name] == metrics(resumed)[step][name], name


@pytest.mark.slow
def test_a_validation_that_is_interrupted_is_made_after_the_resume(whole):
    """`spell stop` comes in the validation after the last step of a run that began with another one's step 2."""
    folder = whole.parent / "interrupted"
    long = ("--validation.limit=100", "--validation.samples=32")
    process = start("--resume", f"{whole}@2", f"--run.name={folder.name}", *long)
    wait_for_step(process, folder, 2)  # until then there are all the metrics of the other run
    wait_for_step(process, folder, 4)
    stopped = spell("stop", folder)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "before its validation" in output, output[-3000:] + errors[-3000:]
    assert stopped.returncode == 0 and "stopped" in stopped.stdout and "step_000004" in stopped.stdout, stopped.stderr
    finished("--resume", str(folder), "--validation.limit=10", "--validation.samples=4")
    for name in ("validation/pass@1", "validation/pass@4"):
        assert metrics(folder)[4][name] == pytest.approx(metrics(whole)[4][name], abs=0.05)
    for step in (3, 4):
        expected = metrics(whole)[step]["train/grad_norm"]
        assert metrics(folder)[step]["train/grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert (folder / "checkpoints" / "best.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_to_everybody_lose_nothing(whole, number, status):
    """Of two trainer processes that write a checkpoint beside the training."""
    folder = whole.parent / f"signalled-{status}"
    where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}", "--run.steps=4")
    two = ("--training.parallel.processes=2", "--checkpoint.asynchronous=true", "--checkpoint.every=1")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL, *two)
    wait_for_step(process, folder, 2)
    signal_all(process, number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == status, output[-3000:] + errors[-3000:]
    assert "Traceback" not in errors
    last = max(metrics(folder))
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{last:06d}"
    finished("--resume", str(folder))
    same_steps(whole, folder, 4)


@pytest.mark.slow
def test_the_death_of_rank_0_is_told_in_a_sentence(whole):
    folder = whole.parent / "without-rank-0"
    where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL, "--training.parallel.processes=2")
    wait_for_step(process, folder, 1)
    first = min(p.pid for p in psutil.Process(process.pid).children() if "train" in command(p))
    psutil.Process(first).kill()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 137
    assert f"Process 0 of the trainer ({first}) was killed by signal 9" in errors and "Traceback" not in errors


def test_two_trainer_processes_take_the_same_step(whole, spread):
    one, two = metrics(whole)[1], metrics(spread)[1]
    assert [r["uid"] for r in dump(whole, 1)] == [r["uid"] for r in dump(spread, 1)]
    for name in ("train/loss", "train/grad_norm", "train/response_tokens", "train/entropy"):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name


def test_pushes_are_verified_where_asked_for(whole, spread):
    assert metrics(spread)[1]["push/verified"] == len(weights(spread, 1))
    assert metrics(whole)[1]["push/verified"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "pipeline", "context"])
def test_a_model_cut_over_two_processes_takes_the_same_step(whole, kind):
    """Export, checkpoint and weight push of a layout in which no process holds the model: the weights that the
    engine validates after the step are those of one process."""
    where = (f"--run.output_dir={whole.parent}", f"--run.name={kind}", "--run.steps=2")
    layout = ("--training.parallel.processes=2", f"--training.parallel.{kind}=2")
    finished("--config", "examples/quickstart.yaml", *where, *SMALL, *layout)
    assert same_weights(weights(whole, 2), weights(whole.parent / kind, 2))
    for step in (1, 2):
        assert metrics(whole.parent / kind)[step]["train/mismatch_abs"] < 1e-4
        for name in ("train/grad_norm", "train/response_tokens", "train/entropy"):
            expected = metrics(whole)[step][name]
            assert metrics(whole.parent / kind)[step][name] == pytest.approx(expected, rel=1e-4), name


def test_a_run_is_not_overwritten(whole):
    process = train("--config", "examples/quickstart.yaml", f"--run.output_dir={whole.parent}", "--run.name=whole")
    assert process.returncode == 2
    assert "--resume" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.slow
def test_an_engine_that_dies_at_start_is_explained(tmp_path):
    """By the whole command; the message itself: tests/rollout/test_servers.py."""
    where = (f"--run.output_dir={tmp_path}", "--run.name=dead", "--rollout.extra_args=[--no-such-flag]")
    process = train("--config", "examples/quickstart.yaml", *where, *SMALL)
    assert process.returncode == 2
    assert "no-such-flag" in process.stderr and "engine-0.log" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "dead" / "checkpoints").exists()


def test_a_killed_engine_is_replaced(whole, resumed):
    """Killed in mid-generation, its requests go to the one that is started in its place, with the weights of the
    step: the batches and updates are those of the undisturbed run."""
    assert "started again" in (resumed / "output.txt").read_text()
    (log,) = (resumed / "logs").glob("engine-0*")
    assert log.read_text().count("----- started ") > 1  # what the killed one said is still there
    same_steps(whole, resumed, 4)


def test_status_of_runs(whole, resumed, tmp_path):
    for run in (whole, resumed):
        told = spell("status", run)
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith(f"{run}: finished\n") and "4/4" in told.stdout and "step_000004" in told.stdout
    again = spell("stop", whole)
    assert again.returncode == 2 and "has ended already" in again.stderr
    dead = tmp_path / "dead"
    dead.mkdir()
    state = json.loads((whole / "status.json").read_text()) | {"state": "running", "time": time.time() - 3600}
    (dead / "status.json").write_text(json.dumps(state))
    told = spell("status", dead)
    assert told.returncode == 3 and "no sign of life for 60 min" in told.stdout
    nothing = spell("status", tmp_path)
    assert nothing.returncode == 2 and "no status.json" in nothing.stderr


@pytest.mark.slow
def test_a_killed_engine_leaves_its_work_to_the_others(whole):
    """Of two engines and two trainer processes: the step ends on the one that is left, and the other one is
    started again for the next weights."""
    folder = whole.parent / "killed-of-two"
    where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}", "--run.steps=3")
    two = ("--rollout.replicas=2", "--training.parallel.processes=2")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL, *two)
    wait_for_step(process, folder, 1)
    servers(process)[1].kill()
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    assert "started again" in output
    same_steps(whole, folder, 3)


@pytest.mark.slow
def test_an_engine_that_fails_again_and_again_ends_the_run(tmp_path):
    where = (f"--run.output_dir={tmp_path}", "--run.name=killed")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL)
    killed = set()
    while process.poll() is None:
        for server in servers(process) if (tmp_path / "killed" / "metrics.jsonl").exists() else ():
            if server.pid not in killed:
                time.sleep(0.1)
                server.kill()
                killed.add(server.pid)
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 2
    assert "killed by signal 9" in stderr and "engine-0" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_full_disk_loses_nothing(whole, tmp_path):
    """Something else fills the disk during step 2; when it has been removed, the run is resumed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk: {mounted.stderr.strip()}")
    try:
        folder = disk / "full"
        where = (f"--run.output_dir={disk}", "--run.name=full", "--run.steps=4", "--checkpoint.every=1")
        process = start("--config", "examples/quickstart.yaml", *where, *SMALL[:-2], "--validation.limit=10")
        wait_for_step(process, folder, 1)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 20))
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 2 and "space" in errors and "resume" in errors, errors
        assert "Traceback" not in errors
        (disk / "filler").unlink()
        finished("--resume", str(folder))
        same_steps(whole, folder, 4)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_engines_started_beforehand_take_the_same_step(whole):
    """The run attaches to a server by its address, and leaves it running with the new weights. Its two trainer
    processes have the cores for themselves, as far as it knows, and begin their update during the rollout."""
    where = (f"--run.output_dir={whole.parent}", "--run.name=attached", "--run.steps=1")
    two = "--training.parallel.processes=2"
    config = load_config(ROOT / "examples" / "quickstart.yaml", [*where, *SMALL])
    with open_engines(config, whole.parent / "attached-logs") as engines:
        (url,) = engines.urls
        finished(
            *("--config", "examples/quickstart.yaml", *where, *SMALL, two, f"--rollout.urls=[{url}]"),
            SPELL_API_KEY=engines.api_key,
        )
        assert engines.engines[0].healthy()
    one, two = dump(whole, 1), dump(whole.parent / "attached", 1)
    assert [(r["uid"], r["prompt"]) for r in one if r["role"] == "questioner"] == [
        (r["uid"], r["prompt"]) for r in two if r["role"] == "questioner"
    ]
    attached = metrics(whole.parent / "attached")[1]
    assert attached["train/mismatch_abs"] < 1e-4 and "time/hidden" in attached
    assert attached["train/grad_norm"] == pytest.approx(metrics(whole)[1]["train/grad_norm"], rel=1e-5)


def test_no_process_outlives_its_run(whole, resumed, spread):
    assert not left_over()
