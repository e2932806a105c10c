"""Updates between which everything leaves the device, against updates without, for `test_swap` and its processes."""

import itertools
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from trainer_cases import make_rows, make_trainer, save

from spell_megatron.checkpoint.restore import load
from spell_megatron.training.optimizer import optimizer_parts
from spell_megatron.training.optimizer_on_host import state_on_host
from spell_megatron.training.swap import Swap
from spell_megatron.training.trainer import Trainer


def held(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What a rank's trainer holds, by a name of its own: weights, gradients, and the optimizer's state."""
    tensors = {f"weights {name}": p.data for name, p in trainer.model.named_parameters()}
    tensors |= {f"gradients {name}": p.main_grad for name, p in trainer.model.named_parameters()}
    for number, part in enumerate(optimizer_parts(trainer.optimizer)):
        inner = part.optimizer
        for place, parameter in enumerate(itertools.chain(*(group["params"] for group in inner.param_groups))):
            tensors[f"state {number} {place}"] = parameter.data
            tensors |= {f"state {number} {place} {k}": x for k, x in inner.state.get(parameter, {}).items()}
    return tensors


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def memory(tensors: dict[str, torch.Tensor], kind: str) -> int:
    """Bytes of the storages of one kind, each counted once, and none that belongs to the weights, too."""
    weights = {t.untyped_storage()._cdata for name, t in tensors.items() if name.startswith("weights")}
    chosen = {t.untyped_storage()._cdata: t.untyped_storage() for n, t in tensors.items() if n.startswith(kind)}
    return sum(s.nbytes() for key, s in chosen.items() if kind == "weights" or key not in weights)


def poison(sizes: list[int]) -> None:
    """Fills memory that will be allocated next with numbers that spoil whatever is computed with them."""
    blocks = [torch.full((size // 4 + 1,), float("nan")) for size in sizes for _ in range(2)]
    del blocks


def swaps(trainer: Trainer, swap: Swap) -> None:
    """Everything leaves, is overwritten, and comes back."""
    tensors = held(trainer)
    before = {kind: memory(tensors, kind) for kind in ("weights", "gradients", "state")}
    kept = copies({name: tensor for name, tensor in tensors.items() if not name.startswith("gradients")})
    sizes = [t.untyped_storage().nbytes() for t in tensors.values()]

    swap.leave(weights=False)  # as before a push
    assert memory(tensors, "weights") == before["weights"] > 0
    assert memory(tensors, "gradients") == memory(tensors, "state") == 0
    swap.leave()
    assert memory(tensors, "weights") == (0 if swap.what == "all" else before["weights"])
    swap.come_back(only_weights=True)  # engines were started again, and get the weights
    assert memory(tensors, "weights") == before["weights"]
    swap.leave()
    swap.leave()
    poison(sizes)
    swap.come_back()
    assert {kind: memory(tensors, kind) for kind in before} == before
    for name, tensor in tensors.items():
        if name.startswith("gradients"):
            tensor.fill_(float("nan"))
        else:
            assert torch.equal(tensor, kept[name]), name


def updates(trainer: Trainer, between=lambda: None, first: int = 0, count: int = 3) -> Iterator[dict[str, float]]:
    """Metrics of updates number `first` (from 0) to `count`, without times."""
    for seed in range(first, count):
        rows = make_rows(seed) if dist.get_rank() == 0 else None
        metrics = trainer.update(rows)
        yield {name: value for name, value in metrics.items() if "second" not in name}
        between()


Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]
"""Metrics of three updates, and weights and optimizer state after them."""


def ordinary(config) -> Outcome:
    """With a trainer that keeps everything on its device."""
    trainer = make_trainer(config)
    return list(updates(trainer)), kept_by(trainer)


def compare_on_host(config, folder: Path, outcome: Outcome) -> None:
    """Three updates with the optimizer's state on the host, the last one after a resume, against three without: bit for
    bit. The checkpoint is also that of the ordinary optimizer, which goes on from it."""
    metrics, expected = outcome
    offloaded = deepcopy(config)
    offloaded.training.optimizer.offload = True

    trainer = make_trainer(offloaded)
    found = list(updates(trainer, lambda: gone(trainer), count=2))
    saved = save(folder, 2, trainer, offloaded, {})
    gone(trainer)
    found += updates(trainer, first=2)
    assert found == metrics
    assert_same(kept_by(trainer), expected)
    for config_ in (offloaded, config):
        resumed = make_trainer(config_)
        load(saved, resumed)
        if config_ is config:
            swaps(resumed, Swap(resumed.model, resumed.optimizer, "all"))
        assert list(updates(resumed, first=2)) == metrics[2:]
        assert_same(kept_by(resumed), expected)


def gone(trainer: Trainer) -> None:
    """The device has nothing of the optimizer's state, and what had it is overwritten."""
    tensors = held(trainer)
    large = {name: tensor for name, tensor in tensors.items() if tensor.dim()}  # steps are counted on the host
    assert memory(large, "state") == 0 < memory(large, "weights")
    poison([4 * tensor.numel() for name, tensor in large.items() if name.startswith("state")])


def kept_by(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of weights and optimizer state."""
    with state_on_host(trainer.optimizer):
        return copies({name: tensor for name, tensor in held(trainer).items() if not name.startswith("gradients")})


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def compare_swapped(config, what: str, outcome: Outcome) -> None:
    """Three updates with everything swapped in between against three without: bit for bit, metrics included."""
    metrics, expected = outcome
    trainer = make_trainer(config)
    swap = Swap(trainer.model, trainer.optimizer, what)
    swaps(trainer, swap)  # before there are moments
    found = list(updates(trainer, lambda: swaps(trainer, swap)))
    assert found == metrics
    assert_same(kept_by(trainer), expected)
    assert swap.seconds > 0
