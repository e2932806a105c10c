"""Two trainer ranks that work during rollouts; see `test_overlap`. Engines and director are left out.

usage: overlap_worker.py FOLDER   (holds the policy)
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from trainer_cases import difference, initialise, make_config, make_rows, make_trainer, weights

from spell_megatron.leader import Follower, Leader
from spell_megatron.monitoring.progress import Progress
from spell_megatron.overlap import finish
from spell_megatron.training import backend
from spell_megatron.training.swap import Swap
from spell_megatron.weights.engine_weights import EngineWeights, Order


def main(folder: Path) -> None:
    config = make_config(folder, training__parallel={"processes": 2})
    initialise(config)
    first = dist.get_rank() == 0
    alone, trainer = make_trainer(config), make_trainer(config)
    stop = SimpleNamespace(reason=lambda: None)
    rank = Leader(config, folder, stop, None) if first else Follower(config, stop)
    rank._trainer, rank._engines = trainer, SimpleNamespace(sleep=lambda: None)
    rank.progress = Progress(enabled=False)
    swap = Swap(trainer.model, trainer.optimizer, "none")
    rank._weights = EngineWeights(trainer.model, None, swap, verify=False, say=print, stop=stop.reason)

    def rows(seed: int):
        return make_rows(seed) if first else None

    def same() -> bool:
        one, two = weights(trainer), weights(alone)
        return not first or difference(one, two) < 1e-5

    def roll_out(early: list, last: Order):
        """What rank 0 does in a rollout, and the others meanwhile."""
        if not first:
            return rank.roll_out(1)
        for some in early:
            rank._accumulate(some)
        return rank._give_up() if last is Order.STOP else (rank._weights.give_order(last), None, {})

    for seed in range(2):
        expected = alone.update(rows(seed))
        pieces = make_rows(seed)
        assert roll_out([pieces[3:7], pieces[:3]], Order.UPDATE) == (Order.UPDATE, None, {})
        found = finish(trainer, pieces[7:] if first else None)
        assert not trainer.under_way and found["response_tokens"] == expected["response_tokens"]
        assert roll_out([make_rows(9)], Order.STOP) == (Order.STOP, None, {})  # as if it had never begun
        assert not trainer.under_way
        assert roll_out([], Order.SKIP) == (Order.SKIP, None, {})
    assert same()
    alone.update(rows(2))
    finish(trainer, rows(2))  # a step without early rows
    assert same()
    backend.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
