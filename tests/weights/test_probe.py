"""Engines and trainer compared before a run: the same computation passes, another one is refused with its likely cause.

The whole of it in a run, for a mixture of experts too: tests/test_families.py.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from engine_fixtures import VOCABULARY, engine_config
from hf_models import load

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.swap import Swap
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.engine_weights import EngineWeights
from spell_megatron.weights.probe import SAMPLES, SHORT, ask, judge


@pytest.fixture
def probe(engines_for, policy, process_group, tmp_path):
    """probe(**config) compares an engine of policy("dense") with a trainer whose config.json has these fields too."""

    def run(killed: bool = False, dtype: str = "float32", quantization: str = "none", **config: object) -> None:
        fp8 = {"dtype": dtype, "quantization": quantization} if quantization != "none" else {}
        engines = engines_for("dense", **fp8)
        folder = shutil.copytree(policy("dense"), tmp_path / "policy")
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
        rollout = engine_config(folder).rollout
        trainer = Trainer(load(folder, dtype), TrainingConfig(), rollout.sampling.temperature, 2)
        swap = Swap(trainer.model, trainer.optimizer, "all")  # the comparison comes when the trainer has left
        weights = EngineWeights(trainer.model, engines, swap, verify=True, say=print, stop=lambda: None)
        weights.push(0)
        if killed:
            (server,) = engines.source.servers.values()
            server.process.kill()

        def mismatch(rows: Sequence[Row] | None) -> list[float]:
            found = trainer.mismatch(rows)
            print(f"differences of log-probabilities: median {np.median(found):.2g}, largest {max(found):.2g}")
            return found

        try:
            weights.probe(mismatch, rollout, rollout.sampling.max_prompt_tokens)
        finally:
            weights.close()

    return run


def test_the_same_computation_agrees(probe):
    probe()  # measured 1e-6; refused above 0.03


@pytest.mark.slow
def test_an_engine_in_float8_agrees(probe):
    probe(dtype="bfloat16", quantization="fp8")  # refused above 0.6


@pytest.mark.slow
def test_an_engine_that_dies_meanwhile_is_replaced(probe):
    probe(killed=True)


def test_another_rotary_embedding_is_refused(probe):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    with pytest.raises(UserError, match=r"same weights and do not compute the same.*option of config.json"):
        probe(rope_parameters=yarn)


def test_what_differs_at_long_distances_only_is_told_so(engines_for, policy):
    engines, rollout = engines_for("dense"), engine_config(policy("dense")).rollout
    longest = rollout.sampling.max_prompt_tokens
    asked = []

    def compare(difference: float, **more: object) -> None:
        def mismatch(rows):
            asked.append(rows)
            return [difference if row.prompt_length == longest else 1e-6 for row in rows]

        (answers,) = ask(engines, VOCABULARY, rollout.model_copy(update=more), longest)
        judge(answers, mismatch(answers.rows), "float32")

    compare(0.02)
    with pytest.raises(
        UserError, match=r"1e-06 after prompts of 24 tokens and 0.5 after prompts of 768 .*rope scaling"
    ):
        compare(0.5)
    with pytest.raises(UserError, match="nan after prompts of 768"):
        compare(math.nan)
    compare(0.0, concurrency=1)  # vLLM refuses more answers to a prompt than the sequences that it may run
    assert len(asked.pop()) == SHORT + 1
    first, again, _ = ([(row.tokens.tolist(), row.rollout_logprobs.tolist()) for row in rows] for rows in asked)
    assert first == again and len(first) == (SHORT + 1) * SAMPLES
    assert all(-20 < value < 0 for _, values in first for value in values)
