"""The numbers of a step are those of its samples."""

import numpy as np
import pytest
from scripted import TASKS, ScriptedPolicy, make_selfplay, roll


@pytest.mark.parametrize("task", ["", *TASKS])
def test_metrics_of_roles_and_votes_are_those_of_the_samples(prompts, task):
    selfplay = make_selfplay(prompts, groups=30)
    for step in (1, 2):  # in the second some questions are remembered
        before = selfplay.history.state_dict()
        rollout = roll(selfplay, ScriptedPolicy(), step)
    samples = [s for s in rollout.samples if task in ("", s.task)]
    metrics = {k.removeprefix(f"selfplay/{task}/" if task else "selfplay/"): v for k, v in rollout.metrics.items()}
    for role in ("questioner", "responder", "verifier"):
        rows = [s for s in samples if s.role == role]
        for name, value in (
            ("reward", lambda s: s.reward),
            ("prompt_tokens", lambda s: len(s.prompt_ids)),
            ("response_tokens", lambda s: len(s.response_ids)),
        ):
            assert metrics[f"{role}/{name}"] == pytest.approx(np.mean([value(s) for s in rows]))
    answers = [s for s in samples if s.role == "responder"]
    judged = [s for s in answers if s.prediction is not None]
    kinds = {
        "verdict_against_rule": [s.verdict is not None and s.verdict != s.rule_score for s in judged],
        "right_by_verdict_only": [s.verdict == 1 and not s.rule_score for s in judged],
        "right_by_rule_only": [s.verdict == 0 and s.rule_score == 1 for s in judged],
        "no_verdict": [s.verdict is None for s in judged],
    }
    for name, cases in kinds.items():
        assert metrics[f"rate/{name}"] == pytest.approx(np.mean(cases))
    # a vote for the verdict has the reward 1, a valid one against it 0
    valid = [s.reward for s in samples if s.role == "verifier" and s.reward >= 0]
    assert 0 < np.mean(valid) < 1 and metrics["rate/agreeing_votes"] == pytest.approx(np.mean(valid))
    for name, rule in (("yes_on_right", 1), ("yes_on_wrong", 0)):
        votes = [s.verdict for s in samples if s.role == "verifier" and s.rule_score == rule and s.verdict in (0, 1)]
        assert metrics[f"rate/{name}"] == pytest.approx(np.mean(votes))
    if not task:
        assert metrics["rate/right_by_verdict_only"] > 0
        assert metrics["generated_tokens"] == sum(len(s.response_ids) for s in rollout.samples)
        entries = {(task, cluster): len(entries) for task, cluster, entries in before["entries"]}
        tasks = {s.cluster_id: s.task for s in samples}
        depths = [entries.get((tasks.get(cluster), cluster), 0) for cluster in rollout.clusters]
        assert sum(depths) > 0 and metrics["history_depth"] == pytest.approx(np.mean(depths))


def test_the_history_counts_what_entered_it(prompts):
    selfplay = make_selfplay(prompts)
    entered = roll(selfplay, ScriptedPolicy()).metrics["history/entered"]
    assert entered == len(selfplay.history.depths()) > 0
