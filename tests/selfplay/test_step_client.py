"""Requests of a step: their seeds, and the weights that may answer them."""

import pytest
from scripted import ScriptedPolicy, make_selfplay, roll

from spell_megatron.errors import UserError


def test_rows_of_another_weight_version_are_refused(prompts):
    with pytest.raises(UserError, match="mixed versions"):
        roll(make_selfplay(prompts), ScriptedPolicy(version="0"))


def test_seeds_differ_between_all_requests(prompts):
    policy = ScriptedPolicy()
    roll(make_selfplay(prompts), policy)
    seeds = [seed for *_, seed, _ in policy.requests]
    assert len(set(seeds)) == len(seeds)
