"""Documents against the longest prompt, counted with the quick start's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_run import ROOT

from spell_megatron.config.reading import load_config
from spell_megatron.preflight import token_counts
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.inspect import inspect
from spell_megatron.tokenizer import PolicyTokenizer

POLICY = ROOT / "examples/quickstart/policy"
SENTENCE = "The age of the mayor of Lepoburg is 41. "


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def found(tmp_path):
    """found(sentences of each document of each cluster, settings) -> what preflight finds."""

    def look(clusters: list[list[int]], *overrides: str, task: str | None = None) -> Findings:
        file = tmp_path / "documents.jsonl"
        rows = (
            {"cluster_id": str(i), "documents": [SENTENCE * n for n in sizes], "task": task if i % 2 else None}
            for i, sizes in enumerate(clusters)
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = [
            f"run.output_dir={tmp_path}",
            f"data.documents={file}",
            "selfplay.groups=1",
            "selfplay.tasks={doc_general_qa: 1}",
        ]
        return inspect(load_config("examples/quickstart.yaml", [*settings, "selfplay.verifier.share=1", *overrides]))

    return look


def test_clusters_that_are_all_too_long_are_a_fault(found):
    [fault] = found([[60, 60], [80, 80]]).faults
    assert fault.keys[0] == "rollout.sampling.max_prompt_tokens"
    tokens = PolicyTokenizer(POLICY).count(SENTENCE * 60)
    said = str(fault)
    assert "2 of 2 clusters" in said and "= 900" in said and "no question could be answered" in said
    shortest = int(said.split("they take ")[1].split(" to ")[0].replace(",", ""))
    assert 2 * tokens < shortest < 2 * tokens + 60
    assert "--max-cluster-tokens" in said and str(POLICY) in said
    assert "positions for prompts of up to" in said  # the policy has too few for these


def test_the_advised_lengths_do(found):
    sizes = [[20, 25, 25]] * 3
    said = str(found(sizes).faults[0])
    raised = said.split("raise rollout.sampling.max_prompt_tokens to ")[1]
    assert not found(
        sizes, f"rollout.sampling.max_prompt_tokens={raised}", "training.tokens_per_microbatch=9000"
    ).faults


def test_some_clusters_that_are_too_long_are_a_warning(found):
    said = found([[2, 2], [60, 60], [3]])
    assert not said.faults
    assert "1 of 3 clusters" in said.warnings[0] and "No questions are asked about them" in said.warnings[0]


def test_what_is_too_long_does_not_count_as_a_cluster(found):
    said = found([[2], [60, 60], [60, 60]], "selfplay.groups=2", "selfplay.max_rounds=1")
    assert [fault.keys[0] for fault in said.faults] == ["selfplay.groups"]
    assert "over 1 clusters" in str(said.faults[0])


def test_a_task_without_a_cluster_that_fits_is_named(found):
    said = found(
        [[2], [60, 60]] * 2,
        "selfplay.tasks={doc_general_qa: 1, docmath_qa: 1}",
        "data.sources={'': [doc_general_qa]}",
        task="docmath_qa",
    )
    assert not said.faults
    assert any("all clusters of docmath_qa are longer" in warning for warning in said.warnings)


def test_instructions_alone_that_are_too_long(found):
    [fault] = found([[2]] * 3, "selfplay.prompts=full").faults
    assert "instructions of the prompt set 'full'" in str(fault) and "for doc_general_qa" in str(fault)


def test_held_out_questions_that_lose_their_middle(found, tmp_path):
    questions = tmp_path / "questions.jsonl"
    row = {"task": "doc_general_qa", "question": "Who?", "answer": "She"}
    questions.write_text("".join(json.dumps(row | {"documents": [SENTENCE * n]}) + "\n" for n in (1, 200)))
    said = found([[2]] * 3, f"validation.questions={questions}")
    assert any("1 of 2 questions" in warning and "lose their middle" in warning for warning in said.warnings)


def test_counts_are_remembered_for_a_content_and_a_tokenizer(tmp_path, cache, monkeypatch):
    file, tokenizer = tmp_path / "texts", PolicyTokenizer(POLICY)
    file.write_text("one two")
    groups = [["one", "two"], ["a mayor"]]
    counts = token_counts.document_tokens(file, groups, tokenizer, POLICY)
    assert counts == [[tokenizer.count(text) for text in group] for group in groups]
    calls = []
    real = tokenizer.counts
    monkeypatch.setattr(tokenizer, "counts", lambda texts: calls.append(1) or real(texts))
    assert token_counts.document_tokens(file, groups, tokenizer, POLICY) == counts and not calls
    file.write_text("other")
    token_counts.document_tokens(file, groups, tokenizer, POLICY)
    assert len(calls) == 1
    other = shutil.copytree(POLICY, tmp_path / "policy")
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + " ")
    token_counts.document_tokens(file, groups, tokenizer, other)
    assert len(calls) == 2
    for remembered in (cache / "spell_megatron" / "tokens").iterdir():
        remembered.write_text("[[1]]")  # torn, or of another program
    assert token_counts.document_tokens(file, groups, tokenizer, POLICY) == counts
