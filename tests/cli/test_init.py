"""`spell init`: settings for a model, documents and hardware, which preflight and planner accept; examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from engine_fixtures import save_policy
from small_run import ROOT

from spell_megatron.config.commented import commented_yaml
from spell_megatron.config.help import all_settings
from spell_megatron.config.reading import load_config

QUICKSTART = ROOT / "examples" / "quickstart"


def words_for(documents: Path, *more: str) -> list[str | Path]:
    return ["--model", QUICKSTART / "policy", "--documents", documents, "--selfplay.prompts=compact", *more]


def corpus(folder: Path, sentences: int, clusters: int = 40) -> Path:
    file = folder / f"corpus-{sentences}.jsonl"
    text = "The age of the mayor of Lepoburg is 41. " * sentences
    rows = ({"cluster_id": str(i), "documents": [text, text]} for i in range(clusters))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_is_written_can_be_started(spell, tmp_path):
    status, output, errors = spell("init", "mine.yaml", *words_for(corpus(tmp_path, 10), "--run.steps=3"))
    assert status == 0, errors
    assert "spell train mine.yaml --dry-run" in output
    text = (tmp_path / "mine.yaml").read_text()
    assert "  # Number of updates.\n  steps: 3\n" in text
    config = load_config(tmp_path / "mine.yaml")
    assert (config.run.name, config.model.dtype, config.selfplay.prompts) == ("mine", "float32", "compact")
    status, output, errors = spell("train", "mine.yaml", "--dry-run")
    assert (status, errors) == (0, "") and "warning" not in output
    status, _, errors = spell("init", "mine.yaml", *words_for(corpus(tmp_path, 10)))
    assert status == 2 and "mine.yaml exists already" in errors
    assert (tmp_path / "mine.yaml").read_text() == text


def test_a_model_with_linear_layers_gets_a_type_that_engines_have(spell, tmp_path):
    save_policy("qwen3_5_text", tmp_path / "hybrid", seed=0)
    words = words_for(corpus(tmp_path, 10), "--model", str(tmp_path / "hybrid"))
    status, _, errors = spell("init", "hybrid.yaml", *words)
    assert status == 0, errors
    assert load_config(tmp_path / "hybrid.yaml").model.dtype == "bfloat16"


def test_limits_follow_from_the_documents(spell, tmp_path):
    limits = []
    for sentences in (5, 20):
        assert spell("init", f"{sentences}.yaml", *words_for(corpus(tmp_path, sentences, 5)))[0] == 0
        config = load_config(tmp_path / f"{sentences}.yaml")
        limits.append(config.rollout.sampling.max_prompt_tokens)
        assert config.selfplay.tasks == {"doc_general_qa": 1.0}  # five clusters are too few for three tasks
        assert spell("train", f"{sentences}.yaml", "--dry-run")[2] == ""
    assert limits[0] < limits[1]
    status, _, errors = spell("init", "long.yaml", *words_for(corpus(tmp_path, 300)))
    assert status == 2 and "All 40 clusters" in errors and "--max-cluster-tokens" in errors
    assert not (tmp_path / "long.yaml").exists()


def test_instructions_that_are_too_long_by_themselves_are_not_blamed_on_the_documents(spell, tmp_path):
    """The quick start's policy spells out the English of the prompt set `full`."""
    words = words_for(corpus(tmp_path, 1))[:4]
    status, _, errors = spell("init", "full.yaml", *words)
    assert status == 2 and "instructions of the prompt set 'full'" in errors and "--selfplay.prompts=compact" in errors
    assert "--max-cluster-tokens" not in errors


def test_the_layout_is_the_planners(spell, tmp_path):
    status, output, errors = spell("init", "gpu.yaml", *words_for(corpus(tmp_path, 10)), "--gpu", "h100", "--gpus", "2")
    assert status == 0, errors
    config = load_config(tmp_path / "gpu.yaml")
    assert config.run.device == "cuda" and config.model.dtype == "bfloat16"
    used = config.training.parallel.processes
    if not config.rollout.colocated:
        used += config.rollout.replicas * config.rollout.tensor_parallel
    assert used == 2 and "a step takes about 0." in output
    assert (
        "settings of a run on 2 x H100-80G" in output
        and "This was not measured." in (tmp_path / "gpu.yaml").read_text()
    )


def test_one_gpu_is_too_few_where_trainer_and_engines_work_at_the_same_time(spell, tmp_path):
    ahead = ["--training.staleness=1", "--training.importance_sampling=token"]
    words = [*words_for(corpus(tmp_path, 10)), "--gpu", "h100", "--gpus", "1"]
    status, _, errors = spell("init", "gpu.yaml", *words, *ahead)
    assert status == 2 and "2 would do" in errors and "With training.staleness: 0" in errors, errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.yaml"], "give --model MODEL and --documents FILE"),
        (["run.yaml", "--model", "nowhere", "--documents", "x"], "nowhere is not a Hugging Face checkpoint"),
        (["run.yaml", *words_for(Path("nowhere.parquet"))], "nowhere.parquet does not exist"),
        (["run.yaml", *words_for(Path("x")), "--gpu", "H1000"], "Known are A100-80G"),
    ],
)
def test_mistakes(spell, tmp_path, words, message):
    status, _, errors = spell("init", *words)
    assert status == 2 and message in errors and "Traceback" not in errors and list(tmp_path.iterdir()) == []


def test_the_quick_start_as_an_example(spell, tmp_path):
    status, _, errors = spell("init", "--example", "quickstart", "mine")
    assert status == 0, errors
    ours, copied = load_config(ROOT / "examples/quickstart.yaml"), load_config(tmp_path / "mine/run.yaml")
    assert copied.model.path == tmp_path / "mine" / "policy" and copied.data.documents.parent == tmp_path / "mine"
    assert copied.validation.questions == tmp_path / "mine" / "heldout.jsonl"
    assert (copied.selfplay, copied.training, copied.rollout) == (ours.selfplay, ours.training, ours.rollout)
    assert {path.name for path in (tmp_path / "mine" / "policy").iterdir()} == {
        path.name for path in (QUICKSTART / "policy").iterdir()
    }
    status, _, errors = spell("init", "--example", "quickstart", "mine")
    assert status == 2 and "mine exists already" in errors


def test_commented_settings_are_those_that_were_given():
    settings = {
        setting.key: yaml.safe_load(setting.default) for setting in all_settings() if setting.default is not None
    }
    text = commented_yaml(settings, ["a head"])
    assert text.startswith("# a head\n")
    read = yaml.safe_load(text)
    for key, value in settings.items():
        content = read
        for part in key.split("."):
            content = content[part]
        assert content == value, key
