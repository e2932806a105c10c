"""A cluster's way from question to judgments, and the ways in which it ends early."""

import numpy as np
import pytest
from scripted import TASKS, ScriptedPolicy, asked, make_selfplay, roll, rows_of, summary

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.selfplay.prompts import PromptSet


def test_samples_carry_their_routings(prompts):
    """One answer of a group has that of the prompt too; answers that are not trained on have none."""
    rollout = roll(make_selfplay(prompts), ScriptedPolicy())
    assert len({s.role for s in rollout.batch}) == 3
    for sample in rollout.batch:
        assert len(sample.routing) + 1 in (len(sample.response_ids), len(sample.prompt_ids) + len(sample.response_ids))
    groups = {}
    for sample in rollout.samples:
        groups.setdefault((sample.role, sample.group), []).append(sample)
    for (role, _), samples in groups.items():
        whole = [s.routing is not None and len(s.routing) >= len(s.prompt_ids) for s in samples]
        if role != "responder":
            assert all(whole)
        elif len({s.reward for s in samples}) > 1:
            assert whole == [True, False, False, False] and all(len(s.routing) for s in samples)
        else:
            assert all(s.routing is None for s in samples)


def test_every_kind_of_outcome_is_counted_and_rewarded(prompts):
    rollout = roll(make_selfplay(prompts, groups=20), ScriptedPolicy())
    rates = {k.removeprefix("selfplay/rate/"): v for k, v in rollout.metrics.items() if k.startswith("selfplay/rate/")}
    for name in ("mixed", "all_0", "all_1", "ungrounded", "bad_format", "truncated", "valid"):
        assert rates[name] > 0, name
    assert rates["zero_answer"] + rates["long_reference"] + rates["all_0"] > 0
    outcomes = ("mixed", "all_0", "all_1", "ungrounded", "bad_format", "truncated", "zero_answer", "long_reference")
    assert sum(rates[name] for name in outcomes) == pytest.approx(1)
    for task in TASKS:
        assert f"selfplay/{task}/rate/mixed" in rollout.metrics
    rewards = {"bad_format": -1.0, "ungrounded": -0.5, "all_0": 0.0, "all_1": 0.0}
    questions = [s for s in rollout.samples if s.role == "questioner"]
    for outcome, reward in rewards.items():
        assert {s.reward for s in questions if s.outcome == outcome} == {reward}
    assert rollout.metrics["selfplay/rate/invalid_votes"] > 0


@pytest.mark.parametrize("verifier", [False, True])
def test_questions_of_the_file_instead_of_a_questioner(prompts, verifier):
    tasks = ("doc_general_qa", "docmath_qa")

    def rolled(policy):
        selfplay = make_selfplay(
            prompts,
            kinds=("mixed", "right", "wrong"),
            asked=lambda i: {"task": tasks[i // 3 % 2], "question": f"What is in {i}?", "answer": "42"},
            verifier={"enabled": verifier},
            tasks=dict.fromkeys(tasks, 1.0),
            questioner={"enabled": False},
        )
        return roll(selfplay, policy)

    policy = ScriptedPolicy(jitter=5)
    rollout = rolled(policy)
    assert not [prompt for _, prompt, *_ in policy.requests if prompt.startswith("questioner") or "|Empty|" in prompt]
    for answer in (sample for sample in rollout.samples if sample.role == "responder"):
        number = int(answer.cluster_id.split("-")[0])
        assert answer.task == tasks[number // 3 % 2] and answer.reference == "42"
        assert answer.prompt.endswith(f"What is in {number}?")
    rows = [sample for sample in rollout.batch if sample.role == "responder"]
    assert len(rows) == 40
    assert verifier or all(row.cluster_id.endswith("mixed") for row in rows)
    assert {sample.role for sample in rollout.batch} == ({"responder", "verifier"} if verifier else {"responder"})
    for group in {row.group for row in rows}:
        assert sum(row.advantage for row in rows if row.group == group) == pytest.approx(0, abs=1e-6)
    assert rollout.metrics["history/clusters"] == 0
    assert summary(rolled(ScriptedPolicy(jitter=9))) == summary(rollout)


def test_without_the_grounding_check_known_questions_are_put_to_the_responder(prompts):
    policy = ScriptedPolicy()
    rollout = roll(make_selfplay(prompts, groups=20, grounding={"enabled": False}), policy)
    assert not asked(policy, "grounding")
    assert rollout.metrics["selfplay/rate/ungrounded"] == 0 and "selfplay/rate/no_context_right" not in rollout.metrics
    known = [s for s in rollout.samples if s.cluster_id.endswith("-known")]
    assert rows_of(known, "responder")
    assert {s.outcome for s in rows_of(known, "questioner")} <= {
        "all_0",
        "all_1",
        "mixed",
    }


def test_one_grounding_answer_for_multiple_choice(prompts):
    def answers(**settings):
        policy = ScriptedPolicy()
        roll(make_selfplay(prompts, tasks={"doc_mc": 1.0}, kinds=("known",), max_rounds=1, **settings), policy)
        return len(asked(policy, "grounding")) / len(asked(policy, "questioner"))

    assert answers() == 4
    assert answers(grounding={"mc_samples": 1}) == 1


def test_without_a_verifier_the_rule_check_alone_rewards(prompts):
    policy = ScriptedPolicy()
    rollout = roll(make_selfplay(prompts, verifier={"enabled": False}), policy)
    assert not asked(policy, "verifier")
    assert all(s.reward == s.rule_score and s.verdict is None for s in rows_of(rollout.samples, "responder"))


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, lambda mean: np.exp(-((mean - 0.5) ** 2) / (2 / 36))),
        ({"sigma": 0.25}, lambda mean: np.exp(-((mean - 0.5) ** 2) / (2 / 16))),
        ({"reward": "azr"}, lambda mean: 1 - mean),
        ({"reward": "r_zero"}, lambda mean: 1 - 2 * abs(mean - 0.5)),
        ({"reward": "variance"}, lambda mean: np.exp(-((mean - mean**2 - 0.25) ** 2) / 0.02)),
    ],
)
def test_rewards_of_questions(prompts, settings, value):
    rollout = roll(make_selfplay(prompts, groups=30, questioner=settings), ScriptedPolicy())
    answers = {}
    for answer in rows_of(rollout.samples, "responder"):
        answers.setdefault(answer.uid, []).append(answer.reward)
    means = set()
    for question in rows_of(rollout.samples, "questioner"):
        mean = np.mean(answers.get(question.uid, [0]))
        if question.outcome == "mixed":
            assert question.reward == pytest.approx(value(mean))
            means.add(mean)
        elif question.outcome not in ("bad_format", "ungrounded"):  # no question without a penalty has less than 0
            assert question.reward == 0
    assert means == {0.25, 0.5, 0.75}


def test_a_bad_sample_is_an_outcome_not_the_end(prompts, monkeypatch):
    from spell_megatron.selfplay import tasks

    real = tasks.rule_score

    def fragile(task, prediction, reference):
        if task == "doc_mc" and prediction == "A":
            raise ZeroDivisionError("scorer broke")
        return real(task, prediction, reference)

    monkeypatch.setattr(tasks, "rule_score", fragile)
    rollout = roll(make_selfplay(prompts, groups=12), ScriptedPolicy())
    assert rollout.metrics["selfplay/mixed_groups"] == 12


@pytest.mark.parametrize(
    ("history_documents", "sizes"), [("all", [3, 6, 9, 12]), ("new", [3, 6, 6, 6]), ("none", [3] * 4)]
)
def test_what_the_history_remembers(prompts, history_documents, sizes):
    """With a history of one question: all documents of it, its new ones, or none but the question itself."""
    questioner = {"history_documents": history_documents, "history": 1, "new_documents": 3}
    selfplay = make_selfplay(
        prompts, n_clusters=2, kinds=("mixed",), groups=2, documents=20, tasks={"doc_general_qa": 1.0},
        group_size=16, questioner=questioner,
    )  # fmt: skip
    for step, size in enumerate(sizes, start=1):
        questions = rows_of(roll(selfplay, ScriptedPolicy(), step).samples, "questioner")
        assert {len(question.document_ids) for question in questions} == {size}
        examples = [question.prompt.partition("cluster")[2] for question in questions]
        assert all(("|1 What about" in example) == (step > 1) for example in examples)


def test_a_repeated_question_costs_no_answers(prompts):
    class Repeating(ScriptedPolicy):
        def text(self, prompt, affinity, seed):
            text, reason = super().text(prompt, affinity, seed)
            return text.replace(f" {seed}?", "?").replace("What", f"{'WHAT' if seed % 2 else 'What'}"), reason

    selfplay = make_selfplay(
        prompts, n_clusters=4, kinds=("mixed",), groups=4, tasks={"doc_general_qa": 1.0}, group_size=16
    )
    first, policy = roll(selfplay, Repeating()), Repeating()
    assert first.metrics["selfplay/rate/repeated"] == 0 and first.metrics["history/entered"] == 4
    selfplay.config.max_rounds = 1
    again = roll(selfplay, policy, step=2)
    assert again.metrics["selfplay/rate/repeated"] == 1 and again.metrics["history/entered"] == 0
    assert {prompt.split("|")[0] for _, prompt, *_ in policy.requests} == {"questioner"}
    assert {question.reward for question in again.samples} == {0}


def test_each_answer_may_see_the_documents_in_an_order_of_its_own(prompts):
    def rolled(**settings):
        policy = ScriptedPolicy()
        return rows_of(roll(make_selfplay(prompts, groups=4, **settings), policy).samples, "responder")

    def documents(answer):
        return answer.prompt.split("|")[2].split("\n")

    groups = {}
    for answer in rolled(responder={"shuffle_documents": True}):
        cluster = answer.cluster_id.partition("-")[0]
        assert [f"{cluster}/{text.split()[1]}" for text in documents(answer)] == answer.document_ids
        groups.setdefault(answer.group, []).append(tuple(documents(answer)))
        assert (
            len(answer.routing) + 1 == len(answer.prompt_ids) + len(answer.response_ids)
            if answer.routing is not None
            else 1
        )
    assert all(
        len(set(orders)) > 1 and len({tuple(sorted(order)) for order in orders}) == 1 for orders in groups.values()
    )
    again = rolled(responder={"shuffle_documents": True})
    assert [a.prompt for a in again] == [a.prompt for a in rolled(responder={"shuffle_documents": True})]


def test_too_long_questioner_prompt_loses_documents(prompts):
    sampling = SamplingConfig(max_prompt_tokens=240)
    names = {name for name in prompts._templates if name.startswith("questioner")}
    wordy = PromptSet({n: t + " please" * 20 * (n in names) for n, t in prompts._templates.items()})
    selfplay = make_selfplay(wordy, kinds=("format",), groups=1, max_rounds=1, sampling=sampling)
    selfplay.tokenizer.count = lambda text: len(text.encode())
    rollout = roll(selfplay, ScriptedPolicy())
    questions = [s for s in rollout.samples if s.role == "questioner"]
    assert questions and all(len(s.prompt_ids) <= 240 and 1 <= len(s.document_ids) < 5 for s in questions)
    assert rollout.metrics["selfplay/count/context_documents_cut"] > 0


def test_too_long_responder_prompt_is_dropped(prompts):
    sampling = SamplingConfig(max_prompt_tokens=220)
    settings = {"tasks": {"doc_general_qa": 1}, "grounding": {"enabled": False}}
    selfplay = make_selfplay(prompts, kinds=("mixed",), groups=1, max_rounds=1, sampling=sampling, **settings)
    rollout = roll(selfplay, ScriptedPolicy())
    assert rollout.metrics["selfplay/rate/responder_prompt_too_long"] == 1
    assert {s.outcome for s in rollout.samples} == {"responder_prompt_too_long"}


def test_no_question_is_asked_about_documents_that_are_too_long(prompts):
    sampling, policy = SamplingConfig(max_prompt_tokens=150), ScriptedPolicy()
    selfplay = make_selfplay(prompts, kinds=("mixed",), groups=1, max_rounds=1, sampling=sampling)
    rollout = roll(selfplay, policy)
    assert rollout.metrics["selfplay/rate/documents_too_long"] == 1
    assert not policy.requests and not rollout.samples and not rollout.batch


def test_documents_are_measured_once_in_a_run(prompts, monkeypatch):
    selfplay = make_selfplay(prompts, n_clusters=20, clusters_per_round=20, max_rounds=1, groups=30)
    measured, prompt_ids = [], selfplay.tokenizer.prompt_ids

    def noted(text, documents=()):
        measured.extend([text] if text.startswith("responder") and text.endswith("|") else [])
        return prompt_ids(text, documents)

    monkeypatch.setattr(selfplay.tokenizer, "prompt_ids", noted)
    for step in (1, 2):  # each takes all clusters
        assert len(roll(selfplay, ScriptedPolicy(), step).clusters) == 20
        assert len(measured) == len(set(measured)) == 20
