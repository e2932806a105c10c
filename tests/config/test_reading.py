"""Settings from YAML files and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import MINIMAL, faults_of

from spell_megatron.config.reading import load_config, to_yaml
from spell_megatron.errors import UserError


def test_defaults_are_the_papers(write):
    config = load_config(write(MINIMAL))
    play = config.selfplay
    assert (play.groups, play.group_size, play.questioner.history) == (128, 8, 3)
    assert (config.rollout.sampling.temperature, config.training.optimizer.lr) == (0.7, 2e-6)


def test_yaml_and_overrides_are_merged_and_the_command_line_wins(write):
    path = write(MINIMAL + "selfplay:\n  groups: 4\n  questioner:\n    history: 1\ntraining:\n")
    config = load_config(
        path,
        [
            "--selfplay.groups=16",
            "selfplay.questioner.mu=0.4",
            "training.optimizer.lr=3e-4",
            "selfplay.tasks={doc_mc: 1}",
            "data.sources.news=[doc_mc]",
            "rollout.sampling.max_verdict_tokens=null",
        ],
    )
    assert config.selfplay.groups == 16
    assert (config.selfplay.questioner.mu, config.selfplay.questioner.history) == (0.4, 1)
    assert config.training.optimizer.lr == 3e-4  # YAML 1.1 reads it as a text
    assert config.selfplay.tasks == {"doc_mc": 1.0}
    assert config.data.sources == {"news": ["doc_mc"]}


def test_two_configurations_do_not_share_their_defaults(write):
    one, other = load_config(write(MINIMAL)), load_config(write(MINIMAL))
    one.selfplay.tasks.clear()
    one.run.name = "changed"
    assert other.selfplay.tasks and other.run.name == "spell"


def test_files_that_are_no_configuration(write, tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write("model: {path: a"))
    with pytest.raises(UserError, match="'steps' occurs twice"):
        load_config(write(MINIMAL + "run:\n  steps: 1\n  steps: 2\n"))
    with pytest.raises(UserError, match="must hold sections"):
        load_config(write("- a\n- b\n"))
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(path)
    assert len(faults_of(write(""))) == 2  # an empty file lacks the two required settings


def test_input_paths_are_taken_from_here_and_else_from_beside_the_yaml(write, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "policy").mkdir(parents=True)
    (tmp_path / "policy").mkdir()
    (tmp_path / "corpus.parquet").touch()
    monkeypatch.chdir(here)
    config = load_config(write(MINIMAL), ["--validation.questions=nowhere.jsonl"])
    assert config.model.path == here / "policy"
    assert config.data.documents == tmp_path / "corpus.parquet"
    assert config.validation.questions == here / "nowhere.jsonl"
    assert config.run.output_dir == Path("runs")


def test_later_files_override_earlier_ones_setting_by_setting(tmp_path, monkeypatch):
    """A setting that is a mapping is replaced as a whole; a path belongs to the folder of the file that names it."""
    (tmp_path / "models" / "policy").mkdir(parents=True)
    (tmp_path / "models" / "policies").mkdir()
    (tmp_path / "policies").mkdir()
    (tmp_path / "corpus.parquet").touch()
    first, second = tmp_path / "first.yaml", tmp_path / "models" / "second.yaml"
    first.write_text(
        "data: {documents: corpus.parquet}\nmodel: {path: policies, dtype: float32}\nlogging:\n"
        "selfplay: {groups: 4, tasks: {doc_mc: 1}, questioner: {history: 1, mu: 0.4}}\nrollout: {replicas: 2}\n"
    )
    second.write_text(
        "model: {path: policy}\nrollout:\nlogging: {dump: none}\n"
        "selfplay: {group_size: 4, tasks: {docmath_qa: 1}, questioner: {mu: 0.6}}\n"
    )
    config = load_config([first, second], ["rollout.concurrency=7"])
    play = config.selfplay
    assert (play.groups, play.group_size, play.tasks) == (4, 4, {"docmath_qa": 1})
    assert (play.questioner.history, play.questioner.mu) == (1, 0.6)
    assert (config.rollout.replicas, config.rollout.concurrency, config.logging.dump) == (2, 7, "none")
    assert (config.model.path, config.model.dtype) == (second.parent / "policy", "float32")
    assert config.data.documents == tmp_path / "corpus.parquet"
    assert load_config([second, first]).model.path == tmp_path / "policies"


def test_of_several_files_the_one_with_the_fault_is_named(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {dtpye: float32}\nrun: {steps: -1}\ntraining: {parallel: {processes: 3}}\n")
    second.write_text(
        "model: {path: policy}\nrun: {steps: -2, sead: 1}\nrollout: {urls: [1]}\ntraining: {parallel: {tensor: 2}}\n"
    )
    with pytest.raises(UserError) as error:
        load_config([first, second], ["training.clip_low=2"])
    head, *lines = str(error.value).splitlines()
    assert head == f"7 faults in {first} and {second}:"
    assert {line.split(":")[0].strip() for line in lines} == {
        f"model.dtpye ({first})",
        "data.documents",
        f"run.steps ({second})",
        f"run.sead ({second})",
        f"rollout.urls.0 ({second})",
        "training.clip_low (command line)",
        f"training.parallel.processes ({first})",
    }


def test_what_is_written_reads_back_the_same(write):
    config = load_config(write(MINIMAL), ["data.sources={a: [doc_mc]}", "selfplay.shuffle_rewards=true"])
    assert load_config(write(to_yaml(config))) == config


def test_off_is_a_word(write):
    """For YAML it is false, unless it is quoted."""
    assert load_config(write(MINIMAL + "training: {overlap: off}")).training.overlap == "off"
    config = load_config(write(MINIMAL), ["--training.overlap=off"])
    assert config.training.overlap == "off" and "overlap: 'off'" in to_yaml(config)
