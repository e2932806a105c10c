"""`spell plan`."""

import json
from pathlib import Path

import pytest

from spell_megatron.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.measures
def test_the_command(checkpoints, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {checkpoints / 'moe'}}}\ndata: {{documents: none}}\n")
    assert main(["plan", "--config", str(path), "--training.parallel.processes=2", "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out
    for part in ("active per token", "gpu_memory_utilization 0.85 (the default)", "a node of 2 trainer ranks"):
        assert part in printed
    for line in ("  update", "  push", "  checkpoint", "limits", "proposal  colocated", "fewest    colocated 1 GPU:"):
        assert f"\n{line}" in printed
    config = json.loads((checkpoints / "moe" / "config.json").read_text())
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    assert main(["plan", "--config", str(path), f"--model.path={short}", "--rollout.colocated=true"]) == 0
    printed = capsys.readouterr().out
    assert "The run will not start: the longest prompt and response together" in printed
    assert "on the trainer's GPUs, in turn with it" in printed and "\n  generate" in printed
    assert main(["plan", "--config", str(path), "--gpu", "H1000"]) == 2
    assert "Known are A100-80G" in capsys.readouterr().err
    assert main(["plan", "--config", str(path), "--host-memory", "4"]) == 2
    assert "of 4 on a node of 1 trainer ranks (a checkpoint being saved" in capsys.readouterr().out


@pytest.mark.measures
def test_a_plan_that_does_not_fit_gets_a_proposal_that_does(capsys):
    big = str(EXAMPLES / "qwen3_30b_a3b_thinking_100k.yaml")
    alone = ["--training.parallel.processes=1", "--training.parallel.tensor=1", "--training.parallel.context=1"]
    assert main(["plan", "--config", big, *alone, "--training.parallel.expert=1"]) == 2
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "limits    GPU memory (update lacks " in printed
    assert "proposal  " in printed and "times as fast" not in printed and "fewest    " in printed


@pytest.mark.measures
def test_nothing_colocated_is_proposed_where_trainer_and_engines_work_at_the_same_time(checkpoints, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {checkpoints / 'moe'}}}\ndata: {{documents: none}}\n")
    ahead = ["--training.staleness=1", "--training.importance_sampling=token"]
    assert main(["plan", "--config", str(path), "--gpu", "h100", "--training.parallel.processes=2", *ahead]) == 0
    printed = capsys.readouterr().out
    assert "proposal  separate " in printed and "fewest    separate " in printed and "colocated " not in printed
