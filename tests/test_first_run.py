"""docs/first_run.md from first to last: its commands as they are written there, on CPUs.

The quick start's policy, a Qwen3 of 0.84 million parameters, stands at a hub of the tests under the name of the page's
model. Only sizes are smaller, and the prompts are those that the policy was taught.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands_not_run import to_run
from hub_server import serve_hub
from small_run import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"
NAME = "Qwen/Qwen3-0.6B"
RUN = "runs/qwen3-0.6b"

ENGINE = ["--run.device=cpu", "--model.dtype=float32", "--selfplay.prompts=compact", "--rollout.cpu_kv_cache_gib=0.25"]
ENGINE += ["--rollout.sampling.temperature=1.0", "--rollout.sampling.top_p=1.0"]
SMALL = {
    "train": [
        *ENGINE,
        "--rollout.colocated=false",  # there are no GPUs to share
        "--run.steps=2",
        "--selfplay.tasks={doc_general_qa: 3.0, docmath_qa: 1.0}",
        "--selfplay.questioner.new_documents=2",
        "--selfplay.groups=6",
        "--selfplay.group_size=4",
        "--selfplay.clusters_per_round=20",
        "--selfplay.verifier.votes=3",
        "--rollout.sampling.max_prompt_tokens=900",
        "--rollout.sampling.max_response_tokens=48",
        "--rollout.sampling.max_verdict_tokens=6",
        "--rollout.sampling.max_no_context_tokens=16",
        "--training.tokens_per_microbatch=1024",
    ],
    "evaluate": [*ENGINE, "--max-input=900", "--max-output=48", "--limit=10", "--samples=2"],
    "ask": ["--max-output=8"],
    "init": ["--selfplay.prompts=compact"],
}


def commands() -> list[list[str]]:
    """The words behind `spell` of all commands of the page."""
    return [words for command in to_run("docs/first_run.md") for words in command.spell]


def smaller(words: list[str]) -> list[str]:
    """A command of the page for the tiny policy."""
    words = [word.replace("step_000060", "step_000003").replace("=60", "=3") for word in words]
    return [*words, *(() if "--resume" in words else SMALL.get(words[0], ()))]


def test_the_page_goes_all_the_way():
    names = [words[0] for words in commands()]
    assert len(names) == len(to_run("docs/first_run.md"))
    expected = ["prepare", "plan", "evaluate", "train", "train", "status", "train", "evaluate", "report", "ask", "init"]
    assert names == expected


@pytest.mark.slow
@pytest.mark.engine
def test_the_commands_of_the_page(tmp_path):
    """A trained run by the model's name, gone on with, evaluated before and after; all of it of one commit."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_documents").mkdir()
    (tmp_path / "my_documents" / "all.parquet").symlink_to(QUICKSTART / "documents.parquet")
    (tmp_path / "my_documents" / "one").mkdir()
    (tmp_path / "my_documents" / "one" / "a.txt").write_text("The age of the mayor of Lepoburg is 41. " * 8)
    (tmp_path / "heldout.jsonl").symlink_to(QUICKSTART / "heldout.jsonl")
    with serve_hub() as hub:
        commit = hub.add_folder(NAME, QUICKSTART / "policy")
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        for words in map(smaller, commands()):
            command = [sys.executable, "-m", "spell_megatron", *words]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            if words[0] == "prepare":  # a newer commit is not what the run goes on with
                assert "model.safetensors" not in hub.fetched
        assert hub.fetched.count("model.safetensors") == 1
    run = tmp_path / RUN
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["path"] == f"{NAME}@{commit}"
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row.get("train/grad_norm")] == [1, 2, 3]
    assert json.loads((tmp_path / "evaluation/before/evaluation.json").read_text())["model"] == f"{NAME}@{commit}"
    assert (tmp_path / "evaluation" / "after" / "scores.md").is_file()
    assert (tmp_path / "report.html").stat().st_size > 100_000
    drafted = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert drafted["rollout"]["colocated"] and drafted["model"]["path"] == f"{NAME}@{commit}"
    assert Path(tmp_path / "home" / "hub").is_dir()
