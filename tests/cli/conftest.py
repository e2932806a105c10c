"""Fixtures of the tests of `spell`: inputs of a run, and a way to call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from engine_fixtures import save_policy

from spell_megatron.cli import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a policy, documents, and run.yaml, which names both beside itself."""
    folder = tmp_path_factory.mktemp("inputs")
    save_policy("dense", folder / "policy", seed=0)
    clusters = [{"cluster_id": str(i), "documents": ["A text.", "Another."]} for i in range(12)]
    (folder / "clusters.jsonl").write_text("".join(json.dumps(cluster) + "\n" for cluster in clusters))
    run = {
        "model": {"path": "policy", "dtype": "float32"},
        "data": {"documents": "clusters.jsonl"},
        "run": {"device": "cpu", "steps": 2},
        "selfplay": {"groups": 2, "clusters_per_round": 6, "prompts": "compact"},
        "rollout": {"sampling": {"max_prompt_tokens": 200, "max_response_tokens": 50}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def spell(tmp_path, monkeypatch, capsys):
    """spell(*words) -> (exit status, output, errors), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def spell(*words: str | Path) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:  # argparse's own way out
            status = end.code
        return status, *capsys.readouterr()

    return spell
