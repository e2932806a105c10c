"""The gate: whether the documents confirm a question's reference."""

from collections import Counter
from fractions import Fraction

import pytest
from scripted import ScriptedPolicy, make_selfplay, roll, rows_of, summary

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.config.selfplay_sections import GateConfig
from spell_megatron.selfplay.checks import confirms

CONTEXT = 5  # documents that a questioner sees, of 7


def documents_in(prompt):
    return prompt.count("Document ")


class Witness(ScriptedPolicy):
    """Answers rightly over all documents as the scripted policy does, and in the gate as `says` tells.

    `says(cluster's number, seed)` gives True (the reference), False or None (no answer).
    """

    def __init__(self, says, **settings):
        super().__init__(**settings)
        self.says, self.gate_prompts = says, []

    def text(self, prompt, affinity, seed):
        if prompt.startswith("responder") and "|Empty|" not in prompt and documents_in(prompt) < 7:
            self.gate_prompts.append(prompt)
            right = self.says(int(affinity.split("-")[0]), seed)
            if right is None:
                return "I cannot tell.", "stop"
            if prompt.split("|")[1] == "doc_mc":
                wanted = "42" if right else "three"
                value = next(line[1] for line in prompt.splitlines() if line.startswith("(") and wanted in line)
            else:
                value = "42" if right else "7"
            return f"So the answer is {value}.", "stop"
        return super().text(prompt, affinity, seed)


def gated(prompts, policy, gate=None, **settings):
    """A step with the gate, whose prompts hold at most six of the seven documents."""
    gate = {"enabled": True, "distractors": 1} | (gate or {})
    settings = {"questioner": {"history": 0}, "kinds": ("mixed",), "groups": 20} | settings
    return roll(make_selfplay(prompts, gate=gate, **settings), policy)


def even(number, seed):
    return number % 2 == 0


def questions(rollout):
    return {int(row.cluster_id.split("-")[0]): row for row in rows_of(rollout.samples, "questioner")}


def test_only_questions_with_a_confirmed_reference_are_answered(prompts):
    rollout = gated(prompts, Witness(even))
    asked = questions(rollout)
    assert {number % 2 for number in asked} == {0, 1}
    for number, question in asked.items():
        answers = [row for row in rows_of(rollout.samples, "responder") if row.uid == question.uid]
        if number % 2:
            assert question.outcome == "unconfirmed" and question.reward == -0.5 and question.gate == 0
            assert not answers
        else:
            assert question.outcome in ("mixed", "all_0", "all_1") and question.gate == 1 and len(answers) == 4
    failed = sum(number % 2 for number in asked)
    assert rollout.metrics["selfplay/rate/unconfirmed"] == failed / len(asked)
    assert rollout.metrics["selfplay/rate/gate_answers_reaching_reference"] == (len(asked) - failed) / len(asked)
    assert all(row.gate is None for row in rollout.samples if row.role != "questioner")


def test_questions_that_fail_are_trained_on_as_negatives_with_their_reward(prompts):
    def negatives(reward):
        settings = {"history": 0, "unconfirmed_reward": reward}
        rollout = gated(prompts, Witness(even), questioner=settings)
        return [row for row in rows_of(rollout.batch, "questioner") if row.outcome == "unconfirmed"]

    assert {row.reward for row in negatives(-0.5)} == {-0.5}
    assert {row.reward for row in negatives(0.0)} == {0.0}


def numbers_of(prompt):
    """The numbers of the documents in a prompt, in its order."""
    return [int(part.split()[0]) for part in prompt.split("|")[2].split("Document ")[1:]]


def test_all_answers_of_a_question_share_a_prompt_over_the_documents_of_its_questioner(prompts):
    policy = Witness(even)
    rollout = gated(prompts, policy, {"distractors": 0, "shuffle": False}, tasks={"doc_general_qa": 1.0})
    asked = {row.prompt.split("|")[2] for row in rows_of(rollout.samples, "questioner")}
    assert asked <= {prompt.split("|")[2] for prompt in policy.gate_prompts}
    assert all(len(numbers_of(prompt)) == CONTEXT for prompt in policy.gate_prompts)
    assert set(Counter(policy.gate_prompts).values()) == {4}


def test_distractors_are_other_documents_and_each_answer_has_its_own_order(prompts):
    policy = Witness(even)
    gated(prompts, policy, {"distractors": 1}, tasks={"doc_general_qa": 1.0}, groups=4)
    by_question = {}
    for prompt in policy.gate_prompts:
        numbers = numbers_of(prompt)
        assert len(set(numbers)) == CONTEXT + 1
        by_question.setdefault(prompt.split("|")[3], []).append(numbers)
    for orders in by_question.values():
        assert len(orders) == 4 and len(set(map(tuple, orders))) > 1
        assert len(set.intersection(*map(set, orders))) >= CONTEXT  # the questioner's documents are in each
    assert any(len(set.union(*map(set, orders))) == CONTEXT + 2 for orders in by_question.values())


def test_distractors_that_do_not_fit_are_left_out(prompts):
    policy = Witness(even)
    # A token is a byte. All seven documents fit into a prompt, and with a question five or six do.
    sampling = SamplingConfig(max_prompt_tokens=215)
    gated(prompts, policy, sampling=sampling, tasks={"doc_general_qa": 1.0}, groups=2)
    assert {documents_in(prompt) for prompt in policy.gate_prompts} == {CONTEXT, CONTEXT + 1}


def test_multiple_choice_is_asked_in_several_orders(prompts):
    """An answer counts by its option, whatever letter the option has; so a liking for one letter confirms nothing."""
    settings = {"tasks": {"doc_mc": 1.0}, "groups": 4}
    policy = Witness(lambda number, seed: True)
    rollout = gated(prompts, policy, {"answers": 4}, **settings)
    assert {row.gate for row in questions(rollout).values()} == {1}
    orders = {}
    for prompt in policy.gate_prompts:
        orders.setdefault(prompt.split("|")[3].splitlines()[0], set()).add(prompt)
    assert max(map(len, orders.values())) > 1

    class LikesB(ScriptedPolicy):
        def text(self, prompt, affinity, seed):
            is_gate = prompt.startswith("responder") and "|Empty|" not in prompt and documents_in(prompt) < 7
            return ("So the answer is B.", "stop") if is_gate else super().text(prompt, affinity, seed)

    rollout = gated(prompts, LikesB(), {"answers": 4}, **settings)
    shares = [row.gate for row in questions(rollout).values()]
    assert 0.1 < sum(shares) / len(shares) < 0.4


def test_answers_that_state_nothing_confirm_nothing(prompts):
    rollout = gated(prompts, Witness(lambda number, seed: None), groups=2, max_rounds=1)
    assert rollout.metrics["selfplay/rate/unconfirmed"] == 1 and not rollout.batch
    rollout = gated(prompts, Witness(lambda number, seed: None), {"condition": "majority"}, groups=2, max_rounds=1)
    assert rollout.metrics["selfplay/rate/unconfirmed"] == 1


@pytest.mark.parametrize("condition", ["share", "majority"])
def test_the_result_does_not_depend_on_timing(prompts, condition):
    def rolled(jitter):
        says = lambda number, seed: seed % 3 > 0  # noqa: E731
        return gated(prompts, Witness(says, jitter=jitter), {"condition": condition}, groups=6)

    first, second = rolled(3), rolled(8)
    assert summary(first) == summary(second)
    assert [row.gate for row in first.samples] == [row.gate for row in second.samples]
    assert 0 < first.metrics["selfplay/rate/unconfirmed"] < 1


def test_without_the_gate_nothing_is_asked_more(prompts):
    policy = Witness(even)
    rollout = roll(make_selfplay(prompts, questioner={"history": 0}), policy)
    assert not policy.gate_prompts and "selfplay/rate/gate_answers_reaching_reference" not in rollout.metrics
    assert rollout.metrics["selfplay/rate/unconfirmed"] == 0


def test_the_cost_is_counted(prompts):
    policy = Witness(even)
    rollout = gated(prompts, policy, groups=1, max_rounds=1, kinds=("right",))
    prompt_bytes = sum(
        len(prompt)
        for _, prompt, *_ in policy.requests
        if prompt.startswith("responder") and "|Empty|" not in prompt and documents_in(prompt) == CONTEXT + 1
    )
    assert rollout.metrics["selfplay/count/gate_prompt_tokens"] == prompt_bytes
    assert rollout.metrics["selfplay/count/gate_response_tokens"] > 0


@pytest.mark.parametrize("answers", range(1, 21))
def test_a_share_is_compared_exactly(answers):
    """A threshold that is a share of the answers passes at exactly that share."""
    for reached in range(1, answers + 1):
        config = GateConfig(threshold=float(Fraction(reached, answers)))
        assert confirms(reached, answers, 0, config) and not confirms(reached - 1, answers, 0, config)


def test_a_majority_must_be_larger_than_any_other_group():
    config = GateConfig(condition="majority")
    assert confirms(2, 4, 1, config) and confirms(1, 4, 0, config)
    assert not confirms(2, 4, 2, config) and not confirms(1, 4, 3, config) and not confirms(0, 4, 0, config)
