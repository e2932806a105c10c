"""When there are enough rows for a call that keeps every rank busy."""

import numpy as np
import pytest

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.prefix_tree import Row, pack, plan
from spell_megatron.training.waiting import Waiting


def groups(count, prompt=60, response=5):
    rng = np.random.default_rng(0)
    for _ in range(count):
        head = rng.integers(0, 100, prompt)
        tails = rng.integers(0, 100, (4, response))
        ones = np.ones(response, np.float32)
        yield [Row(np.concatenate([head, tail]), prompt, ones, -ones) for tail in tails]


@pytest.mark.parametrize(("ranks", "stages", "trees"), [(1, 1, 1), (4, 1, 4), (1, 2, 8), (2, 4, 32)])
def test_a_call_fills_all_ranks_and_stages(ranks, stages, trees):
    """Groups of 80 tokens for microbatches of 100: each fills one."""
    training = TrainingConfig(tokens_per_microbatch=100, parallel={"pipeline": stages, "processes": ranks * stages})
    waiting, calls, given = Waiting(training, ranks), [], []
    for rows in groups(70):
        given += rows
        if ready := waiting.add(rows):
            calls.append(ready)
            plans = plan(ready, 100, ranks)
            assert [len(tree) for tree in plans] == [trees // ranks] * ranks
    rest = waiting.take()
    assert [row for call in [*calls, rest] for row in call] == given
    assert len(pack(rest, 100)) < trees if rest else not 70 % trees
    assert not waiting.take()


def test_a_few_tokens_wait_for_more():
    waiting = Waiting(TrainingConfig(tokens_per_microbatch=1000), 1)
    judgments, answers = next(groups(1, prompt=10, response=1)), next(groups(1, prompt=50, response=5))
    assert not waiting.add(judgments) and waiting.add(answers) == judgments + answers
    assert not waiting.add(judgments) and waiting.take() == judgments
