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
    assert main(["plan", "--config", str(path), "--training.parallel.processes=2"]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed and "active per token" in printed and "proposal" in printed
    config = json.loads((checkpoints / "moe" / "config.json").read_text())
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    main(["plan", "--config", str(path), f"--model.path={short}"])
    assert "The run will not start: the longest prompt and response together" in capsys.readouterr().out
    assert main(["plan", "--config", str(path), "--gpu", "H1000"]) == 2
    assert "Known are A100-80G" in capsys.readouterr().err
    big = str(EXAMPLES / "qwen3_30b_a3b_thinking_100k.yaml")
    alone = ["--training.parallel.processes=1", "--training.parallel.tensor=1", "--training.parallel.context=1"]
    assert main(["plan", "--config", big, *alone, "--training.parallel.expert=1"]) == 2
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "no layout on 1 GPUs fits" in printed
