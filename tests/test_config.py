"""The configuration by itself: reading, overrides, and every fault at once."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from spell_megatron.config.help import all_settings
from spell_megatron.config.reading import load_config, read_config, to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError

MINIMAL = "model: {path: policy}\ndata: {documents: corpus.parquet}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults_of(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without its first."""
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{len(lines)} fault") and str(path) in first
    return [line.strip() for line in lines]


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


def test_every_fault_is_reported_at_once_each_on_a_line_with_its_remedy(write):
    path = write(
        """
        model: {dtpye: float32}
        selfplay:
          groups: 0
          tasks: {docmath_qa: 1, doc_mcc: 2}
          temperature: 3
          verifier: {agreement_low: 0.9, agreement_high: 0.2}
        rollout: {sampling: 7}
        training: {optimizer: {betas: [0.9], lr: .nan}}
        run: {device: cdua}
        nonsense: 1
        """
    )
    lines = faults_of(path, "--rollout.replica=2", "--run.steps=[1", "--flag", "--selfplay.groups.x=1")
    expected = {
        "model.path": "is missing",
        "model.dtpye": "Did you mean model.dtype?",
        "data.documents": "--data.documents=",
        "selfplay.groups": "greater than or equal to 1",
        "selfplay.groups.x": "single value",
        "selfplay.tasks.doc_mcc": "Did you mean doc_mc?",
        "selfplay.temperature": "Did you mean rollout.sampling.temperature?",
        "selfplay.verifier.agreement_low": "shares of votes",
        "rollout.sampling": "must be a section",
        "rollout.replica": "Did you mean rollout.replicas?",
        "training.optimizer.betas.1": "field required",
        "training.optimizer.lr": "finite",
        "run.device": "Did you mean cuda?",
        "run.steps": "not valid YAML",
        "flag": "needs a value",
        "nonsense": "Known here: checkpoint, data",
    }
    by_key = dict(line.split(": ", 1) for line in lines)
    assert by_key.keys() == expected.keys()
    for key, text in expected.items():
        assert text in by_key[key]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"run": {"name": "../escape"}}, "run.name"),
        ({"run": {"name": ""}}, "run.name"),
        ({"selfplay": {"tasks": {}}}, "selfplay.tasks"),
        ({"selfplay": {"tasks": {"doc_mc": -1, "docmath_qa": 1}}}, "selfplay.tasks"),
        ({"selfplay": {"groups": 11, "clusters_per_round": 5, "max_rounds": 2}}, "selfplay.groups"),
        ({"selfplay": {"questioner": {"history_low": 1.0}}}, "selfplay.questioner.history_low"),
        ({"data": {"sources": {"a": []}}}, "data.sources"),
        ({"data": {"sources": {"a": ["doc_mc", "doc_mc"]}}}, "data.sources"),
        ({"data": {"sources": {"a": ["doc_mc"]}}, "selfplay": {"tasks": {"docmath_qa": 1}}}, "data.sources"),
        ({"training": {"optimizer": {"betas": [0.9, 1.0]}}}, "training.optimizer.betas"),
        ({"training": {"optimizer": {"min_lr": 1e-3}}}, "training.optimizer.min_lr"),
        ({"training": {"optimizer": {"warmup_steps": 70}}}, "training.optimizer.warmup_steps"),
        ({"training": {"clip_low": 1.0}}, "training.clip_low"),
        ({"training": {"importance_sampling": "sequence"}}, "training.importance_sampling"),
        ({"training": {"role_weights": {"verifier": -1}}}, "training.role_weights"),
        (
            {"training": {"role_weights": {"questioner": 0, "responder": 0, "verifier": 0}}},
            "training.role_weights",
        ),
        ({"selfplay": {"verifier": {"votes": 2}}}, "selfplay.verifier.votes"),
        ({"selfplay": {"group_size": 2}}, "selfplay.verifier.votes"),
        ({"selfplay": {"verifier": {"agreement_low": 0.9}}}, "selfplay.verifier.votes"),
        (
            {"selfplay": {"verifier": {"votes": 1, "require_rule_agreement": False}}},
            "selfplay.verifier.require_rule_agreement",
        ),
        ({"training": {"parallel": {"processes": 3, "tensor": 2}}}, "training.parallel.processes"),
        ({"training": {"parallel": {"processes": 2, "expert": 4}}}, "training.parallel.processes"),
        (
            {"training": {"moe_dispatcher": "allgather", "parallel": {"processes": 2, "pipeline": 2}}},
            "training.moe_dispatcher",
        ),
        ({"rollout": {"base_port": 65535, "replicas": 2}}, "rollout.base_port"),
        ({"validation": {"every": 3}}, "validation.every"),
    ],
)
def test_settings_that_do_not_go_together(write, settings, key):
    raw = yaml.safe_load(MINIMAL)
    for section, values in settings.items():
        raw.setdefault(section, {}).update(values)
    lines = faults_of(write(yaml.safe_dump(raw)))
    assert [line.split(":")[0] for line in lines] == [key]


@pytest.mark.parametrize(
    "overrides",
    [
        ("--selfplay.verifier.votes=1",),
        ("--selfplay.verifier.votes=3",),
        ("--selfplay.verifier.votes=2", "--selfplay.verifier.agreement_high=1"),
        ("--selfplay.verifier.votes=2", "--selfplay.verifier.share=0"),
        ("--selfplay.verifier.votes=2", "--training.role_weights={verifier: 0}"),
        ("--selfplay.group_size=2", "--selfplay.verifier.enabled=false"),
    ],
)
def test_a_verifier_that_can_be_trained_or_is_not_meant_to_be(write, overrides):
    load_config(write(MINIMAL), overrides)


def test_a_relation_of_a_faulty_setting_is_left_out(write):
    lines = faults_of(write(MINIMAL), "--training.optimizer.lr=fast", "--training.optimizer.min_lr=1")
    assert [line.split(":")[0] for line in lines] == ["training.optimizer.lr"]


def test_processes_started_from_outside_count(write, monkeypatch):
    path = write(MINIMAL + "training: {parallel: {tensor: 2}}")
    assert faults_of(path)[0].startswith("training.parallel.processes: 1 trainer process")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_config(path).training.parallel.tensor == 2


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


def test_every_setting_is_explained():
    listed = list(all_settings())
    assert len(listed) > 80
    assert [setting.key for setting in listed if not setting.help] == []
    assert [setting.key for setting in listed if setting.default is None] == ["model.path", "data.documents"]
    for setting in listed:  # what the help shows as the default is one
        if setting.default is not None:
            raw = yaml.safe_load(MINIMAL)
            *sections, leaf = setting.key.split(".")
            inner = raw
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = yaml.safe_load(setting.default)
            assert Config.model_validate(raw) == Config.model_validate(yaml.safe_load(MINIMAL))


# recursive: anything YAML can hold may stand in the place of any section
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = ["selfplay", "rollout.sampling", "training.optimizer", "x.y"]
KEYS = st.sampled_from([setting.key for setting in all_settings()] + SECTIONS)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_no_content_of_a_file_raises_anything_but_user_errors(tmp_path_factory, values):
    raw: dict = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        inner = raw
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[leaf] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    reading = read_config(path)
    assert isinstance(reading.settings, Config)
    for fault in reading.faults:
        assert str(fault).isprintable()
