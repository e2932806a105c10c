"""Which clusters a step uses, whatever the timing, and what ends a step."""

import pytest
from scripted import ScriptedPolicy, make_selfplay, roll, summary, zip_first

from spell_megatron.errors import UserError


def test_two_timings_give_the_same_batches_history_and_sampler(prompts):
    one, two = make_selfplay(prompts), make_selfplay(prompts)
    for step in (1, 2, 3):
        calm, wild = roll(one, ScriptedPolicy(), step), roll(two, ScriptedPolicy(jitter=step), step)
        assert calm.clusters == wild.clusters
        assert summary(calm) == summary(wild)
        assert one.state_dict() == two.state_dict()
    assert one.state_dict()["history"], "three steps must have left something in the history"


def test_the_step_uses_the_shortest_prefix_with_n_mixed_groups(prompts):
    selfplay = make_selfplay(prompts)
    order = [cluster.id for cluster, _ in zip_first(selfplay.sampler.upcoming(), 60)]
    rollout = roll(selfplay, ScriptedPolicy(jitter=2))
    assert rollout.clusters == order[: len(rollout.clusters)]
    mixed = {s.uid for s in rollout.batch if s.role == "responder"}
    assert len(mixed) == 10 and f"1.{len(rollout.clusters) - 1}" in mixed
    # the next step begins where the prefix ended: surplus clusters were given back
    following = [cluster.id for cluster, _ in zip_first(selfplay.sampler.upcoming(), 5)]
    assert following == order[len(rollout.clusters) : len(rollout.clusters) + 5]


def test_slow_clusters_keep_their_place(prompts):
    """A slow cluster admitted early is waited for; fast later ones do not displace it."""
    selfplay = make_selfplay(prompts, kinds=("mixed-slow", "mixed"), groups=4)
    rollout = roll(selfplay, ScriptedPolicy())
    used = {s.cluster_id for s in rollout.batch if s.role == "responder"}
    assert any(cluster.endswith("slow") for cluster in used)
    assert {s.cluster_id for s in rollout.batch} <= set(rollout.clusters)


def test_surplus_is_cancelled(prompts):
    selfplay = make_selfplay(prompts, kinds=("mixed", "mixed", "mixed", "mixed-slow"), groups=3)
    policy = ScriptedPolicy()
    rollout = roll(selfplay, policy)
    if rollout.metrics["selfplay/surplus_clusters"]:
        assert policy.cancelled or len(policy.requests) > 0
    assert rollout.metrics["selfplay/mixed_groups"] == 3


def test_limit_of_rounds_updates_with_what_there_is(prompts):
    selfplay = make_selfplay(prompts, kinds=("mixed", "wrong", "wrong", "wrong"), groups=50, max_rounds=1)
    rollout = roll(selfplay, ScriptedPolicy())
    assert len(rollout.clusters) == 30
    assert 0 < rollout.metrics["selfplay/mixed_groups"] < 50
    assert rollout.batch


def test_no_mixed_group_at_all_gives_a_batch_without_answers(prompts):
    verifier = {"enabled": False}
    selfplay = make_selfplay(prompts, kinds=("wrong",), groups=5, max_rounds=1, verifier=verifier)
    rollout = roll(selfplay, ScriptedPolicy())
    assert not [s for s in rollout.batch if s.role == "responder"]


def test_a_broken_program_ends_the_step(prompts, monkeypatch):
    from spell_megatron.selfplay import roles

    def broken(*_):
        raise ZeroDivisionError("always")

    monkeypatch.setattr(roles, "parse_verdict", broken)
    with pytest.raises(UserError, match="internal error"):
        roll(make_selfplay(prompts, kinds=("mixed",), groups=60), ScriptedPolicy())


def test_engine_failure_ends_the_step_with_its_own_message(prompts):
    selfplay = make_selfplay(prompts)
    before = selfplay.state_dict()
    with pytest.raises(UserError, match="engine 0 is gone"):
        roll(selfplay, ScriptedPolicy(fail="responder|"))
    assert selfplay.state_dict() == before, "a failed step must leave no trace in the state"
