"""Killed and started again: the same bytes, and nothing finished is done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from spell_megatron.corpus.prepare import prepare
from spell_megatron.corpus.workers import ordered_map
from spell_megatron.errors import UserError

ROOT = Path(__file__).parents[2]


def make_corpus(path: Path, documents: int) -> None:
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(4000)]
    topics = [rng.sample(vocabulary, 40) for _ in range(documents // 10)]
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(rng.choices(topics[number % len(topics)], k=120))
            file.write(json.dumps({"text": text}) + "\n")


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "spell_megatron", "prepare", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def kill_at(process: subprocess.Popen, sign: Path) -> None:
    """SIGKILL as soon as a file or folder is there."""
    deadline = time.monotonic() + 300
    while not sign.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_every_stage_it_goes_on_to_the_same_bytes(tmp_path):
    make_corpus(tmp_path / "corpus.jsonl", 4000)
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"context": " ".join(f"other{i}" for i in range(50))}))
    arguments = tmp_path / "corpus.jsonl", "--decontaminate", evaluation, "--tasks", "doc_mc,doc_general_qa"
    whole = start(*arguments, "--out", tmp_path / "whole.parquet")
    assert whole.wait() == 0, whole.communicate()

    out, work = tmp_path / "out.parquet", tmp_path / ".out.parquet.work"
    kept = {}
    for sign in ("reading.partial/pieces.arrow", "reading", "embedding.partial/0.npy", "embedding", "grouping"):
        kill_at(start(*arguments, "--out", out), work / sign)
        assert not out.exists()
        for name, times in kept.items():  # results of stages that an earlier run has finished
            assert (work / name).stat().st_mtime_ns == times
        stages = [path for path in work.iterdir() if path.is_dir() and path.suffix != ".partial"]
        kept = {path.name: path.stat().st_mtime_ns for path in stages}
    last = start(*arguments, "--out", out)
    said, _ = last.communicate()
    assert last.returncode == 0, said
    for stage in ("evaluation sets", "reading", "near-duplicates", "embedding", "grouping"):
        assert f"{stage}: finished before" in said
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    statistics = [(tmp_path / f"{name}.statistics.json").read_bytes() for name in ("whole", "out")]
    assert statistics[0] == statistics[1]
    assert not work.exists()


def test_a_part_of_the_vectors_is_not_made_again(tmp_path, monkeypatch):
    """What a killed run has left of an unfinished stage is used, and ends in the same bytes."""
    from spell_megatron.corpus import embedding

    monkeypatch.setattr("spell_megatron.corpus.vectors._PART", 16)
    make_corpus(tmp_path / "corpus.jsonl", 80)
    prepare([tmp_path / "corpus.jsonl"], tmp_path / "whole.parquet")
    whole, asked = embedding.embed_words, []

    def failing(sample, batches, workers, seed):
        for number, vectors in enumerate(whole(sample, batches, workers, seed)):
            if number == 2 and not asked:
                raise OSError(28, "No space left on device")
            yield vectors

    monkeypatch.setattr(embedding, "embed_words", failing)
    with pytest.raises(UserError, match="the disk is full.*what is finished is not repeated"):
        prepare([tmp_path / "corpus.jsonl"], tmp_path / "out.parquet")
    parts = tmp_path / ".out.parquet.work" / "embedding.partial"
    assert sorted(path.name for path in parts.iterdir()) == ["0.npy", "1.npy"]

    def counting(sample, batches, workers, seed):
        return whole(sample, (asked.append(len(batch)) or batch for batch in batches), workers, seed)

    monkeypatch.setattr(embedding, "embed_words", counting)
    prepare([tmp_path / "corpus.jsonl"], tmp_path / "out.parquet")
    assert asked == [16, 16, 16]
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_other_inputs_or_options_start_over(tmp_path, monkeypatch, capsys):
    from spell_megatron.corpus import prepare as stages

    make_corpus(tmp_path / "corpus.jsonl", 40)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([tmp_path / "corpus.jsonl"], tmp_path / "out.parquet")
    assert (tmp_path / ".out.parquet.work" / "grouping").is_dir()
    make_corpus(tmp_path / "corpus.jsonl", 60)
    summary = prepare([tmp_path / "corpus.jsonl"], tmp_path / "out.parquet")
    said = capsys.readouterr().err
    assert "starting over" in said and "finished before" not in said
    assert sum(summary.cluster_documents) == 60


def test_two_at_work_on_one_output_are_kept_apart(tmp_path, monkeypatch):
    from spell_megatron.corpus import prepare as stages

    make_corpus(tmp_path / "corpus.jsonl", 20)
    write, out = stages.write, tmp_path / "out.parquet"

    def second(*arguments):
        monkeypatch.setattr(stages, "write", write)
        with pytest.raises(UserError, match="is in use by `spell prepare --out out.parquet`"):
            prepare([tmp_path / "corpus.jsonl"], out)
        return write(*arguments)

    monkeypatch.setattr(stages, "write", second)
    prepare([tmp_path / "corpus.jsonl"], out)
    assert out.exists()


def test_a_worker_that_dies_is_explained():
    with pytest.raises(UserError, match="fewer --workers"):
        list(ordered_map(os._exit, [9], 2))


def test_results_come_in_order_and_little_is_taken_ahead():
    taken = []
    results = ordered_map(abs, (taken.append(n) or -n for n in range(50)), 2)
    assert next(results) == 0 and len(taken) <= 6
    assert list(results) == list(range(1, 50))


def test_workers_do_not_outlive_a_killed_parent():
    code = (
        "import os, time\n"
        "from spell_megatron.corpus.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    for pid in ordered_map(eval, ['__import__(\"os\").getpid()'] * 1000, 2):\n"
        "        print(pid, flush=True)\n"
        "        time.sleep(0.01)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    parent.stdout.readline()
    workers = psutil.Process(parent.pid).children()
    assert workers
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
