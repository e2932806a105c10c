"""Started by torchrun with 2 processes: data-parallel runs whose results the tests read.

usage: trainer_worker.py FOLDER   (holds the policies; results are written beside them)
"""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from trainer_cases import initialise, make_config, make_rows, make_trainer, saver, weights

    from spell_megatron.checkpoint.folder import latest
    from spell_megatron.checkpoint.restore import load
    from spell_megatron.training import backend

    initialise(make_config(folder / "qwen3"))
    rank = dist.get_rank()

    def update(trainer, seed):
        return trainer.update(make_rows(seed) if rank == 0 else None)

    for family in ("qwen3", "qwen3_moe"):
        for distributed in (False, True):
            config = make_config(
                folder / family,
                training__optimizer__distributed=distributed,
                checkpoint__keep=1,
                checkpoint__asynchronous=family == "qwen3",
            )
            trainer = make_trainer(config)
            metrics = [update(trainer, seed) for seed in range(2)]
            everywhere = [None, None]
            dist.all_gather_object(everywhere, metrics)
            result = {
                "metrics": metrics,
                "same_metrics": everywhere[0] == everywhere[1],
                "weights": weights(trainer),
            }
            run = folder / f"run_{family}_{distributed}"
            with saver(run, trainer, config) as saving:
                saving.save(2, {"rank": rank})
                result["next"] = []
                for seed in (2, 3, 4):
                    result["next"].append(update(trainer, seed))
                    saving.poll()
                saving.finish()
            result["next_weights"] = weights(trainer)
            resumed = make_trainer(config)
            result["state"] = load(latest(run), resumed)
            result["resumed"] = [update(resumed, seed) for seed in (2, 3, 4)]
            result["resumed_weights"] = weights(resumed)
            if rank == 0:
                torch.save(result, folder / f"{family}_{distributed}.pt")

    # More ranks than work: the second rank runs an empty microbatch.
    trainer = make_trainer(make_config(folder / "qwen3_moe"))
    metrics = trainer.update(make_rows()[:1] if rank == 0 else None)
    result = {"metrics": metrics, "weights": weights(trainer)}
    if rank == 0:
        torch.save(result, folder / "one_row.pt")
    backend.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
