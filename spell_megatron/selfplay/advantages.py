"""Group-relative advantages (paper, Eqs. 8 and 9, with the released code's sample deviation)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from spell_megatron.selfplay.batch import ROLES, Sample

EPSILON = 1e-6


def assign_advantages(samples: Sequence[Sample], questioner_group: Literal["task", "batch"]) -> None:
    """Set every sample's advantage (r - mean) / (std + 1e-6) over the samples it is compared with.

    Responder and verifier rows are compared within their group; a row alone in it keeps its reward
    (mean 0, std 1). Questioner rows are compared with all of their task, or of the batch; fewer than
    two, or equal ones, have advantage 0. std is the sample standard deviation (n - 1).
    """
    groups: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.role == "questioner":
            groups["questioner", sample.task if questioner_group == "task" else ""].append(sample)
        else:
            groups[sample.role, sample.group].append(sample)
    for (role, _), members in groups.items():
        rewards = [sample.reward for sample in members]
        if len(members) > 1:
            mean, deviation = fmean(rewards), stdev(rewards)
        else:
            mean, deviation = (rewards[0], 0.0) if role == "questioner" else (0.0, 1.0)
        for sample in members:
            sample.advantage = (sample.reward - mean) / (deviation + EPSILON)


def shuffle_advantages(samples: Sequence[Sample], rng: random.Random) -> None:
    """Exchange the advantages at random among the samples of each role: a control that teaches nothing."""
    for role in ROLES:
        rows = [sample for sample in samples if sample.role == role]
        advantages = rng.sample([row.advantage for row in rows], len(rows))
        for row, advantage in zip(rows, advantages, strict=True):
            row.advantage = advantage
