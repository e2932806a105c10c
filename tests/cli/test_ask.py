"""`spell ask`: documents, settings, prompts, and real answers."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from small_run import ROOT

from spell_megatron.cli import ask, command_parser
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError

POLICY = ROOT / "examples/quickstart/policy"


@pytest.fixture
def folder(tmp_path):
    """Two documents in a folder, and a hidden one."""
    (tmp_path / "texts").mkdir()
    for name, text in {"b.md": "The mayor is Ada.", "a.txt": "The town is Halden.", ".hidden": "x"}.items():
        (tmp_path / "texts" / name).write_text(text)
    return tmp_path / "texts"


def config_of(*words: object) -> Config:
    arguments, arguments_rest = command_parser().parse_known_args(["ask", *map(str, words), "--documents", "x"])
    return ask._config(arguments, arguments_rest)


def test_documents_are_read_in_their_order(folder):
    assert ask._documents([folder], None) == [("a.txt", "The town is Halden."), ("b.md", "The mayor is Ada.")]
    assert [name for name, _ in ask._documents([folder / "b.md", folder / "a.txt"], None)] == [
        str(folder / "b.md"), str(folder / "a.txt")
    ]  # fmt: skip


def test_documents_of_a_cluster(tmp_path):
    file = tmp_path / "clusters.jsonl"
    file.write_text(json.dumps({"cluster_id": "c", "documents": ["one", "two"], "document_ids": ["1", "2"]}) + "\n")
    assert ask._documents([file], "c") == [("1", "one"), ("2", "two")]
    with pytest.raises(UserError, match="no cluster 'd'.*The first are c"):
        ask._documents([file], "d")


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "There is no file or folder .*nowhere"), ("texts", "There are no documents")]
)
def test_documents_that_are_not_there(tmp_path, name, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=message):
        ask._documents([tmp_path / name], None)


def test_a_question_is_not_among_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        command_parser().parse_known_args(["ask"])
    assert "required: MODEL, --documents" in capsys.readouterr().err


def test_what_is_no_text_and_no_model(folder, tmp_path):
    table = tmp_path / "texts" / "rows.jsonl"
    table.write_text('{"question": "Who?"}\n')
    assert len(ask._documents([folder], None)) == 2
    with pytest.raises(UserError, match="is a table.*--cluster ID"):
        ask._documents([table], None)
    with pytest.raises(UserError, match="There is no model in"):
        config_of(tmp_path)


def test_settings_that_do_not_exist_are_told():
    with pytest.raises(UserError, match=r"temperature: unknown key. Did you mean rollout.sampling.temperature\?"):
        config_of(POLICY, "--temperature=0.5")


def test_a_step_of_a_run_brings_the_runs_settings(tmp_path, monkeypatch):
    step = tmp_path / "checkpoints" / "step_000012"
    step.mkdir(parents=True)
    (step / "hf").symlink_to(POLICY)
    run = {
        "model": {"path": "elsewhere", "dtype": "float32", "prompt_date": "2024-07-26"},
        "data": {"documents": "gone.parquet"},
        "selfplay": {"prompts": "compact"},
        "rollout": {"urls": ["http://gone:1"], "replicas": 8, "sampling": {"max_prompt_tokens": 700}},
    }
    (step / "config.json").write_text(json.dumps(run))
    config = config_of(step, "--max-output=50", "--rollout.sampling.temperature=0.5")
    assert (config.selfplay.prompts, config.rollout.urls, config.rollout.replicas) == ("compact", [], 1)
    sampling = config.rollout.sampling
    assert (sampling.max_prompt_tokens, sampling.max_response_tokens, sampling.temperature) == (700, 50, 0.5)
    assert config.model.path == step / "hf" and str(config.model.prompt_date) == "2024-07-26"


def test_a_model_gets_limits_that_it_has_positions_for():
    sampling = config_of(POLICY).rollout.sampling
    positions = json.loads((POLICY / "config.json").read_text())["max_position_embeddings"]
    assert sampling.longest_sequence == positions


def test_questions_come_from_the_command_line_or_line_by_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\n  Where? \n"))
    assert list(ask._questions([])) == ["Who?", "Where?"]
    assert list(ask._questions(["When?"])) == ["When?"]


def test_a_running_engine_answers(engines_for, policy, spell, folder, monkeypatch):
    engines = engines_for("dense")
    monkeypatch.setenv("SPELL_API_KEY", engines.api_key)
    words = ("--documents", folder, "Who is the mayor?", "--samples", 2, "--max-input", 700, "--max-output", 24)
    settings = ("--selfplay.prompts=compact", "--model.dtype=float32", f"--rollout.urls={engines.urls}")
    status, output, errors = spell("ask", policy("dense"), *words, *settings)
    assert status == 0, errors
    assert "documents: a.txt, b.md" in output and "Who is the mayor?\n(prompt of " in output
    assert "[1] " in output and "[2] " in output and output.count("    answer: ") == 2
    assert engines.engines[0].healthy()  # it is not ours to end


@pytest.mark.slow
@pytest.mark.engine
def test_an_engine_is_started_and_ended(spell, folder, tmp_path):
    policy = shutil.copytree(POLICY, tmp_path / "policy")
    settings = (
        "--selfplay.prompts=compact",
        "--model.dtype=float32",
        "--run.device=cpu",
        "--rollout.cpu_kv_cache_gib=0.25",
    )
    words = ("--samples", 2, "--max-output", 24, *settings)
    status, output, errors = spell("ask", policy, "--documents", folder, "Who is the mayor?", *words)
    assert status == 0, errors
    assert output.count("    answer: ") == 2
