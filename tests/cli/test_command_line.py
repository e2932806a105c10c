"""The `spell` command: help, exit statuses, messages."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from spell_megatron import __version__
from spell_megatron.config.help import all_settings


def test_help_is_good_reading(spell):
    status, text, _ = spell("--help")
    assert status == 0 and "train " in text and "prepare " in text
    status, text, _ = spell("train", "--help")
    assert status == 0
    for setting in all_settings():
        assert f"\n  {setting.key}  (" in text
    assert "(number; default 0.7)\n      Sampling temperature of all roles" in text
    assert spell("--version")[1] == f"spell_megatron {__version__}\n"


@pytest.mark.parametrize("command", ["train", "plan", "launch", "evaluate"])
def test_help_of_a_section(spell, command):
    status, text, _ = spell(command, "--help", "selfplay.gate")
    keys = [line.split()[0] for line in text.splitlines() if line.startswith("  s")]
    assert status == 0 and keys and all(key.startswith("selfplay.gate.") for key in keys)
    assert "number; default 0.75)\n      Smallest share" in text


def test_help_of_a_word_and_of_nothing(spell):
    assert "training.optimizer.clip_grad" in spell("train", "--help", "clip")[1]
    assert "--selfplay" not in spell("train", "--help", "run.steps")[1]
    status, _, errors = spell("train", "--help", "nonsense")
    assert status == 2 and "Sections are model, data, run" in errors


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["spell", "pre"], ["prepare"]),
        (["spell", "plan", "--gpu"], ["--gpu", "--gpus-per-node"]),
        (["spell", "train", "--selfplay.gate.en"], ["--selfplay.gate.enabled="]),
        (["spell", "report", "--selfplay"], []),
    ],
)
def test_a_shell_completes(spell, tmp_path, line, words):
    script = spell("completion", "bash")[1]
    ask = f'COMP_WORDS=({" ".join(line)}) COMP_CWORD={len(line) - 1}; _spell; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-uc", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == words and not done.stderr


def test_help_answers_without_the_heavy_imports():
    code = (
        "import sys; from spell_megatron import cli; cli.command_parser(); "
        "print(sorted({'torch', 'megatron', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "Give a YAML file with --config"),
        (["train", "--config", "missing.yaml"], "no configuration file missing.yaml"),
        (["train", "--resume", "nowhere"], "no run to resume in nowhere"),
        (["train", "--config", "x.yaml", "stray"], "Unexpected argument 'stray'"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required"),
        (["prepare", "in", "--out", "x.parquet", "--wrong"], "unknown argument '--wrong'"),
        (["prepare", "missing.txt", "--out", "x.parquet"], "missing.txt"),
    ],
)
def test_a_wrong_command_line_is_a_message_and_status_2(spell, tmp_path, words, message):
    status, output, errors = spell(*words)
    assert status == 2 and output == ""
    assert message in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_all_faults_of_file_command_line_and_machine_come_at_once(spell, inputs, tmp_path):
    status, output, errors = spell(
        "train", "--config", inputs / "run.yaml", "--selfplay.group_sise=4",
        "--training.optimizer.lr", "fast", "--model.path", "nowhere",
        f"--data.documents={inputs / 'run.yaml'}", "--run.steps", "-1",
    )  # fmt: skip
    assert status == 2 and output == ""
    first, *lines = errors.splitlines()
    assert first == f"spell: 5 faults in {inputs / 'run.yaml'}:"
    assert {line.split(":")[0].strip() for line in lines} == {
        "selfplay.group_sise", "training.optimizer.lr", "model.path", "data.documents", "run.steps"
    }  # fmt: skip
    assert "Did you mean selfplay.group_size?" in errors
    assert list(tmp_path.iterdir()) == []
