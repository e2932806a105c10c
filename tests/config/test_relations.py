"""Settings that do not fit together."""

from __future__ import annotations

import pytest
import yaml
from config_files import MINIMAL, faults_of

from spell_megatron.config.reading import load_config


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
        (
            {"training": {"optimizer": {"offload": True, "distributed": False}}, "checkpoint": {"asynchronous": True}},
            "training.optimizer.offload",
        ),
        ({"training": {"clip_low": 1.0}}, "training.clip_low"),
        ({"training": {"importance_sampling": "sequence"}}, "training.importance_sampling"),
        ({"training": {"staleness": 1}}, "training.staleness"),
        ({"training": {"staleness": 1, "importance_sampling": "token", "swap": "all"}}, "training.staleness"),
        ({"training": {"staleness": 1, "importance_sampling": "token", "moe_aux_loss": 0.1}}, "training.staleness"),
        (
            {"training": {"staleness": 1, "importance_sampling": "token"}, "rollout": {"colocated": True}},
            "training.staleness",
        ),
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
        ({"rollout": {"colocated": True, "replicas": 2}}, "rollout.colocated"),
        ({"rollout": {"colocated": True, "urls": ["http://a:1"]}}, "rollout.colocated"),
        ({"model": {"dtype": "float32"}, "rollout": {"quantization": "fp8"}}, "rollout.quantization"),
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
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert load_config(path).training.parallel.tensor == 2
