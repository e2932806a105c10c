"""Settings that are wrong by themselves: every fault at once, with its remedy."""

from __future__ import annotations

import hypothesis
import pytest
import yaml
from config_files import faults_of
from hypothesis import strategies as st

from spell_megatron.config.help import all_settings
from spell_megatron.config.other_names import OTHER_NAMES
from spell_megatron.config.reading import read_config
from spell_megatron.config.schema import Config


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
    ("key", "meant"),
    [
        ("training.optimizer.learning_rate", "training.optimizer.lr"),
        ("training.learning_rate", "training.optimizer.lr"),
        ("learning-rate", "training.optimizer.lr"),
        ("lr", "training.optimizer.lr"),
        ("training.weight_decay", "training.optimizer.weight_decay"),
        ("selfplay.num_generations", "selfplay.group_size"),
        ("run.max_steps", "run.steps"),
        ("rollout.max_new_tokens", "rollout.sampling.max_response_tokens"),
        ("model.model_name_or_path", "model.path"),
        ("checkpoint.save_steps", "checkpoint.every"),
        ("threads", "rollout.threads or training.threads"),
        ("selfplay.group_sise", "selfplay.group_size"),
    ],
)
def test_names_of_other_programs_and_of_other_sections(write, key, meant):
    lines = faults_of(write("model: {path: m}\ndata: {documents: d}\n"), f"--{key}=1")
    assert [line for line in lines if line.endswith(f"Did you mean {meant}?")] == lines


def test_other_names_lead_to_settings():
    keys = {setting.key for setting in all_settings()}
    assert not [name for name, key in OTHER_NAMES.items() if not any(k == key or k.startswith(f"{key}.") for k in keys)]
    assert not {key.rsplit(".", 1)[-1] for key in keys} & OTHER_NAMES.keys()


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


@pytest.mark.parametrize(
    ("seed", "fault"), [(-1, "greater than or equal to 0"), (20250101123000, "less than 4294967296")]
)
def test_a_seed_that_numpy_would_refuse_later(write, seed, fault):
    assert any("run.seed" in line and fault in line for line in faults_of(write("{}"), f"--run.seed={seed}"))
