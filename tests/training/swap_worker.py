"""Started by torchrun with 2 processes: what leaves the device between updates, in several layouts.

usage: swap_worker.py FOLDER   (holds the policies)
"""

import sys
from pathlib import Path

CASES = {
    "tensor": ("qwen3", "float32", False, {"tensor": 2}),
    "data": ("qwen3", "bfloat16", False, {}),
    "data, distributed": ("qwen3", "bfloat16", True, {}),
    "pipeline, tied": ("qwen2", "bfloat16", True, {"pipeline": 2}),
    "experts": ("qwen3_moe", "bfloat16", True, {"expert": 2}),
}


def main(folder: Path) -> None:
    from swap_cases import compare_on_host, compare_swapped, ordinary
    from torchrun import end_layout
    from trainer_cases import initialise, make_config

    from spell_megatron.training import backend, optimizer_on_host

    optimizer_on_host.PIECE_BYTES = 20_000  # several pieces
    for name, (policy, dtype, distributed, parallel) in CASES.items():
        config = make_config(
            folder / policy,
            model__dtype=dtype,
            training__optimizer__distributed=distributed,
            training__parallel=parallel,
        )
        initialise(config)
        print(name, flush=True)
        outcome = ordinary(config)
        compare_swapped(config, "all", outcome)
        if distributed:
            compare_on_host(config, folder / name, outcome)
        end_layout()
    backend.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
