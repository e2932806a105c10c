"""Two trainer ranks and engines that take turns on the same GPUs; see `test_turns`.

The trainer is real. What needs a GPU is left out: each rank makes a handle of its own buffer in memory of the CPU. The
engines only note what happens to them, and what each rank holds on its device meanwhile.

usage: turns_worker.py FOLDER   (holds the policy)
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import requests
import torch
import torch.distributed as dist
from swap_cases import copies, held, memory
from torch.multiprocessing import reductions
from trainer_cases import initialise, make_config, make_rows, make_trainer

from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_all
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.training import backend
from spell_megatron.training.swap import Swap
from spell_megatron.weights.engine_weights import EngineWeights, Order

KINDS = ("weights", "gradients", "state")
WHOLE, WEIGHTS, NOTHING = " ".join(KINDS), "weights", ""


def on_device(trainer) -> str:
    tensors = held(trainer)
    return " ".join(kind for kind in KINDS if memory(tensors, kind))


class Watched(Swap):
    """Tells the ranks' store what this rank holds. Rank 1 is always the last to leave."""

    def __init__(self, trainer) -> None:
        super().__init__(trainer.model, trainer.optimizer, "all")
        self._trainer, self._store, self._left = trainer, dist.distributed_c10d._get_default_store(), 0
        self._tell()

    def leave(self, weights=None) -> None:
        self._left += 1
        if dist.get_rank():
            self._store.wait([f"rank 0 has left {self._left} times"])
        super().leave(weights)
        self._tell()
        self._store.set(f"rank {dist.get_rank()} has left {self._left} times", "")

    def come_back(self, only_weights=False) -> None:
        super().come_back(only_weights)
        self._tell()

    def _tell(self) -> None:
        self._store.set(f"on device {dist.get_rank()}", on_device(self._trainer))

    def everywhere(self) -> set[str]:
        return {self._store.get(f"on device {rank}").decode() for rank in range(2)}


class Engine:
    """Takes every push, and nothing else."""

    url = "http://127.0.0.1:9"

    def __init__(self, happens) -> None:
        self._happens, self._names = happens, []

    def call(self, method, *args, timeout=0):
        if method == "spell_describe":
            return [{"workers": 1}]
        report = {"received": dict.fromkeys(self._names, ""), "unused": [], "missing": []}
        self._names = []
        return [report]

    def post(self, route, body=None, params=None, timeout=0):
        if route == "/update_weights":
            if not self._names:
                self._happens("push", requests.HTTPError)
            self._names += body["update_info"]["names"]
        return {"success": True}


class Engines:
    """Notes what happens, and what all ranks hold meanwhile. What `fails` names fails once."""

    restartable, transport, urls = True, IPC, [Engine.url]

    def __init__(self, swap: Watched) -> None:
        self._swap, self.engines, self.fails = swap, [Engine(self.happens)], ""
        self.events: list[tuple[str, set[str]]] = []

    def happens(self, what: str, error: type[Exception] = UserError) -> None:
        self.events.append((what, self._swap.everywhere()))
        if self.fails == what:
            self.fails = ""
            raise error(f"cannot {what}")

    def failed(self) -> list[int]:
        return []

    def sleep(self) -> None:
        self.happens("sleep")

    def wake(self, part: str) -> None:
        self.happens(f"wake {part}")

    def restart(self, numbers) -> None:
        assert list(numbers) in ([0], [])
        self.happens("restart")


PUSH = [("wake weights", {WEIGHTS}), ("push", {WEIGHTS}), ("wake kv_cache", {NOTHING})]
SLEEP = ("sleep", {NOTHING})
RESTART = [("restart", {NOTHING}), SLEEP]


def main(folder: Path) -> None:
    config = make_config(folder, model__dtype="bfloat16", training__parallel={"processes": 2, "tensor": 2})
    initialise(config)
    rank = dist.get_rank()
    move = torch.Tensor.to
    torch.Tensor.to = lambda t, *a, **k: t if a[:1] == ("cuda",) else move(t, *a, **k)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"GPU-{rank}")
    reductions.reduce_tensor = lambda tensor: (None, ("handle", rank))

    def update(trainer, seed):
        metrics = trainer.update(make_rows(seed) if rank == 0 else None)
        return {name: value for name, value in metrics.items() if "second" not in name}

    alone = make_trainer(config)
    expected = [update(alone, seed) for seed in range(3)]

    trainer = make_trainer(config)
    swap = Watched(trainer)
    engines = Engines(swap) if rank == 0 else None
    stop = SimpleNamespace(asked=False)
    weights = EngineWeights(trainer.model, engines, swap, verify=False, say=lambda line: None, stop=lambda: stop.asked)

    def push(step: int, fails: str, happened: list) -> None:
        if engines:
            engines.fails, engines.events = fails, []
        done = weights.push(step)
        assert on_device(trainer) == NOTHING
        if engines:
            assert engines.events == happened, engines.events
            assert "time/push" in done and done["time/swap"] > 0

    def order(which: Order, revive: bool = False, fails: str = "", happened: list | None = None) -> None:
        """The trainer's turn begins."""
        if engines:
            engines.fails, engines.events = fails, []
            if revive:
                weights.revive()
            weights.sleep()
            assert engines.events == happened, engines.events
        assert (weights.give_order(which) if engines else weights.wait_for_order()) is which
        assert on_device(trainer) == (NOTHING if which is Order.END else WHOLE)

    found = [update(trainer, 0)]
    push(1, "", PUSH)
    order(Order.UPDATE, happened=[SLEEP])
    push(1, "wake weights", [PUSH[0], *RESTART, *PUSH])
    push(1, "push", [*PUSH[:2], *RESTART, *PUSH])
    push(1, "wake kv_cache", [*PUSH, *RESTART, *PUSH])
    order(Order.UPDATE, revive=True, happened=[*RESTART, *PUSH, SLEEP])
    found.append(update(trainer, 1))
    push(2, "", PUSH)
    order(Order.UPDATE, fails="sleep", happened=[SLEEP, *RESTART])  # an engine has ended
    found.append(update(trainer, 2))
    push(3, "", PUSH)
    order(Order.SKIP, happened=[SLEEP])

    # The end of a job ends the engines in the middle of a push: there is nothing to repeat, and a checkpoint to save.
    stop.asked = True
    if engines:
        engines.fails, engines.events = "wake kv_cache", []
    assert weights.push(3) == {} or rank == 0
    if engines:
        assert engines.events == PUSH
        weights.give_order(Order.STOP)
    else:
        weights.wait_for_order()
    assert on_device(trainer) == WHOLE

    assert found == expected
    kept = copies(held(alone))
    for name, tensor in held(trainer).items():
        assert name.startswith("gradients") or torch.equal(tensor, kept[name]), name
    from_all(None)
    weights.close()
    backend.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
