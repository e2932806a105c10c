"""Started by torchrun: updates in every layout of a list, whose results `test_trainer_layouts` reads.

Each case makes two updates and saves them; then a fresh trainer goes on with a third one from the checkpoint
that the case before with the same policy has saved, or from its own, if it is the first. The case before may have
another layout and another kind of optimizer. Another fresh trainer makes the two updates in pieces.

usage: trainer_layouts_worker.py FOLDER   (holds policies and cases.json; results are written beside them)
"""

import json
import sys
from pathlib import Path


def check(folder: Path, name: str, policy: str, settings: dict, saved: dict[str, Path]) -> None:
    import torch
    import torch.distributed as dist
    from trainer_cases import (
        initialise,
        make_config,
        make_routed_rows,
        make_rows,
        make_trainer,
        save,
        update_in_pieces,
        weights,
    )

    from spell_megatron.checkpoint.restore import load
    from spell_megatron.training import layers

    grouped = settings.pop("grouped_experts", False)  # no setting: GPUs have them
    layers._wants_grouped_experts = lambda use_te: grouped
    rows = make_routed_rows if settings.pop("routed", False) else make_rows
    config = make_config(folder / policy, **settings)
    initialise(config)
    trainer = make_trainer(config)

    def update(trainer, seed):
        return trainer.update(rows(seed) if dist.get_rank() == 0 else None)

    mismatch = trainer.mismatch(rows(0) if dist.get_rank() == 0 else None)
    metrics = [update(trainer, seed) for seed in range(2)]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [{k: v for k, v in m.items() if "second" not in k} for m in metrics])
    result = {
        "metrics": metrics,
        "mismatch": mismatch,
        "same": all(m == everywhere[0] for m in everywhere),
        "weights": weights(trainer),
    }
    training = config.training
    key = f"{policy} {training.moe_aux_loss} {training.importance_sampling}"
    before = saved.get(key)
    saved[key] = save(folder / name, 2, trainer, config, {})
    resumed = make_trainer(config)
    load(before or saved[key], resumed)
    result["resumed"] = update(resumed, 2), weights(resumed)
    trainer = make_trainer(config)
    result["pieces"] = [update_in_pieces(trainer, rows(seed), seed) for seed in range(2)], weights(trainer)
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{name}.pt")


def main(folder: Path) -> None:
    from torchrun import end_layout

    from spell_megatron.training import backend

    saved: dict[str, Path] = {}
    for name, (policy, settings) in json.loads((folder / "cases.json").read_text()).items():
        check(folder, name, policy, settings, saved)
        end_layout()
    backend.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
