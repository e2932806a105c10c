"""Updates with what leaves the device in between, against updates without; for `test_swap` and the processes it starts."""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from trainer_cases import make_rows, make_trainer

from spell_megatron.training.optimizer import optimizer_parts
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


def updates(trainer: Trainer, between=lambda: None, count: int = 3) -> Iterator[dict[str, float]]:
    """Metrics of some updates, without times."""
    for seed in range(count):
        rows = make_rows(seed) if dist.get_rank() == 0 else None
        metrics = trainer.update(rows)
        yield {name: value for name, value in metrics.items() if "second" not in name}
        between()


def compare_swapped(config, what: str) -> None:
    """Three updates with everything swapped in between against three without: bit for bit, metrics included."""
    trainer = make_trainer(config)
    metrics, expected = list(updates(trainer)), copies(held(trainer))
    trainer = make_trainer(config)
    swap = Swap(trainer.model, trainer.optimizer, what)
    swaps(trainer, swap)  # before there are moments
    found = list(updates(trainer, lambda: swaps(trainer, swap)))
    assert found == metrics
    for name, tensor in held(trainer).items():
        if not name.startswith("gradients"):
            assert torch.equal(tensor, expected[name]), name
    assert swap.seconds > 0
