"""A run's self-play: its state, its batches, and what settings of the ablations change in them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import ScriptedPolicy, asked, make_selfplay, roll, rows_of, summary

ROOT = Path(__file__).parents[2]


def test_self_play_imports_no_model_library():
    code = (
        "import sys, spell_megatron.selfplay.selfplay\n"
        "print([m for m in ('torch', 'vllm', 'megatron', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_resume_from_state_gives_the_same_next_batch(prompts):
    one = make_selfplay(prompts)
    roll(one, ScriptedPolicy(), 1)
    state = json.loads(json.dumps(one.state_dict()))
    other = make_selfplay(prompts)
    other.load_state_dict(state)
    assert summary(roll(one, ScriptedPolicy(), 2)) == summary(roll(other, ScriptedPolicy(jitter=5), 2))


def test_the_repr_of_a_step_has_no_tokens(prompts):
    """asyncio.Runner makes it twice a step; of prompts of 100,000 tokens it would take seconds."""
    rollout = roll(make_selfplay(prompts), ScriptedPolicy())
    assert "prompt_ids" not in repr(rollout) and rollout.clusters[0] in repr(rollout)


def test_questions_dropped_without_penalty_are_not_trained_on(prompts):
    rollout = roll(make_selfplay(prompts, groups=20), ScriptedPolicy())
    assert not any("-long" in s.cluster_id for s in rollout.batch)


# Ablations: each setting of the table in docs/algorithm.md does what the table says, and nothing else


@pytest.mark.parametrize("reward", [-1.0, 0.0])
def test_questions_that_do_not_parse_lose_against_others_with_and_without_a_penalty(prompts, reward):
    """Without the penalty they still count as questions without reward, which are compared with rewarded ones."""
    kinds = ("mixed", "mixed", "format")
    selfplay = make_selfplay(prompts, kinds=kinds, groups=20, questioner={"bad_format_reward": reward})
    questions = rows_of(roll(selfplay, ScriptedPolicy()).batch, "questioner")
    bad = [s for s in questions if s.outcome == "bad_format"]
    assert bad and {s.reward for s in bad} == {reward}
    assert all(s.advantage < 0 for s in bad)
    ratio = make_selfplay(prompts, kinds=kinds, groups=20, negatives_per_positive=0.0)
    assert {s.outcome for s in rows_of(roll(ratio, ScriptedPolicy()).batch, "questioner")} == {"mixed"}


def test_no_verifier_share_judges_but_does_not_train(prompts):
    policy = ScriptedPolicy()
    plain, without = roll(make_selfplay(prompts), policy), roll(make_selfplay(prompts, verifier={"share": 0.0}), policy)
    assert rows_of(plain.batch, "verifier") and not rows_of(without.batch, "verifier")
    votes = [[(s.group, s.response, s.reward) for s in rows_of(r.samples, "verifier")] for r in (plain, without)]
    assert votes[0] == votes[1]
    assert rows_of(plain.batch, "responder") == rows_of(without.batch, "responder")


def test_a_single_judgment_decides_and_learns_from_the_rule_check(prompts):
    policy = ScriptedPolicy()
    rollout = roll(make_selfplay(prompts, groups=20, verifier={"votes": 1, "share": 0.5}), policy)
    assert {n for _, prompt, _, n in policy.requests if prompt.startswith("verifier|")} == {1}
    judgments = {s.group: s for s in rows_of(rollout.samples, "verifier")}
    assert {s.verdict for s in judgments.values()} == {1, 0, -1}
    assert len({(s.group, s.prediction) for s in judgments.values()}) == len(judgments)  # one an answer
    trained = rows_of(rollout.batch, "verifier")
    assert len(trained) == 40  # half as many as the answers of 20 groups of 4
    for row in trained:
        assert row.verdict == row.rule_score and row.reward == 1.0
        assert row.advantage == pytest.approx(1, abs=1e-5)
    # it alone decides what an answer is worth beside the rule check
    for answer in rows_of(rollout.samples, "responder"):
        assert answer.reward == max(answer.rule_score, answer.verdict or 0)


def test_verdicts_against_the_rule_check_are_trained_on_if_asked_for(prompts):
    def against(**verifier):
        rollout = roll(make_selfplay(prompts, groups=20, verifier={"share": 4.0, **verifier}), ScriptedPolicy())
        answers = {}  # the judgments of an answer by their group
        for row in rows_of(rollout.batch, "verifier"):
            answers.setdefault(row.group, []).append(row)
        verdicts = [next(r.verdict for r in rows if r.reward == 1) for rows in answers.values()]
        rules = [rows[0].rule_score for rows in answers.values()]
        return sum(verdict != rule for verdict, rule in zip(verdicts, rules, strict=True)), len(answers)

    assert against()[0] == 0 < against()[1]
    wrong, groups = against(require_rule_agreement=False)
    assert wrong > 0 and groups > against()[1]


@pytest.mark.parametrize("role", ["questioner", "responder", "verifier"])
def test_a_role_that_is_not_trained_plays_but_has_no_rows(prompts, role):
    """The rows of the others, advantages included, are what they are without it."""
    plain, without = roll(make_selfplay(prompts), ScriptedPolicy()), make_selfplay(prompts, untrained=[role])
    without = roll(without, ScriptedPolicy())
    assert without.samples == plain.samples
    assert rows_of(plain.batch, role) and without.batch == [s for s in plain.batch if s.role != role]
    assert without.metrics[f"batch/{role}/rows"] == 0 and f"batch/{role}/reward" not in without.metrics


def test_no_history(prompts):
    selfplay = make_selfplay(prompts, n_clusters=3, kinds=("mixed",), groups=3, max_rounds=1, questioner={"history": 0})
    for step in (1, 2, 3):
        policy = ScriptedPolicy()
        rollout = roll(selfplay, policy, step)
        assert rollout.metrics["selfplay/history_depth"] == rollout.metrics["history/entered"] == 0
        assert all(len(s.document_ids) == 5 for s in rows_of(rollout.samples, "questioner"))
        # the template with examples ends with the question that it is shown
        assert not [prompt for prompt in asked(policy, "questioner") if "What about" in prompt]


def test_all_right_questions_are_remembered_if_asked_for(prompts):
    def remembered(**questioner):
        selfplay = make_selfplay(prompts, kinds=("right",), max_rounds=1, questioner=questioner)
        roll(selfplay, ScriptedPolicy())
        return len(selfplay.history.depths())

    verifier_errs = remembered()  # none but where a mistaken judgment makes no difference: answers are right
    assert verifier_errs == 0 < remembered(history_high=1.01)


def test_the_group_size_is_that_of_answers_and_of_judgments(prompts):
    for size, votes in ((6, {}), (3, {"votes": 5})):
        policy = ScriptedPolicy()
        rollout = roll(make_selfplay(prompts, group_size=size, verifier={"share": 1.0, **votes}), policy)
        sizes = {}
        for row in rollout.batch:
            sizes.setdefault((row.role, row.group), []).append(row)
        assert {len(rows) for (role, _), rows in sizes.items() if role == "responder"} == {size}
        assert {len(rows) for (role, _), rows in sizes.items() if role == "verifier"} == {votes.get("votes", size)}


def test_shuffled_rewards_keep_the_advantages_but_not_their_rows(prompts):
    plain = roll(make_selfplay(prompts), ScriptedPolicy())
    control = roll(make_selfplay(prompts, shuffle_rewards=True), ScriptedPolicy())
    assert [s.response for s in plain.batch] == [s.response for s in control.batch]
    for role in ("questioner", "responder", "verifier"):
        before = [s.advantage for s in plain.batch if s.role == role]
        after = [s.advantage for s in control.batch if s.role == role]
        assert sorted(before) == sorted(after) and (before != after or len(set(before)) < 2)
