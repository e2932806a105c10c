"""The commands of the pages that no test runs, each with the reason. What is not named here is run."""

from __future__ import annotations

from page_commands import PAGES, Command, commands, name_of

INSTALLS = "installs packages, from an index"
TESTS = "runs tests, which are run anyway"
GPUS = "needs GPUs, and models of the hub"
OWN = "is about data of the reader's own"
HUB = "fetches tens of gigabytes from the hub"
MINUTES = "works or measures for many minutes; its file in benchmarks/results, or what it made, is kept"
AFTER = "needs what the commands before it made, which are not run"
HOURS = "trains for hours; its results are kept"
SAME = "is a run like another one of these pages, of which a copy stands for it"

NOT_RUN = {
    "README.md": {"make test": TESTS, "pip install": INSTALLS, "pip uninstall": INSTALLS},
    "CONTRIBUTING.md": {"OMP_NUM_THREADS=1 python -m pytest": TESTS},
    "docs/cluster.md": {"python3.11 -m venv .venv-slurm": INSTALLS, ".venv-slurm/bin/pip install": INSTALLS},
    "docs/documents.md": {
        "spell prepare ultra_fineweb/": OWN,
        "spell prepare docmath_train.parquet": OWN,
        "spell prepare docmath.parquet web.parquet": OWN,
        "VLLM_API_KEY=$SPELL_API_KEY vllm serve Qwen/Qwen3-Embedding-8B": GPUS,
        "spell prepare web/ --out web.parquet --embedding-model": GPUS,
        "python benchmarks/prepare.py": MINUTES,
    },
    "docs/evaluation.md": {
        "spell evaluate --model runs/my_run/checkpoints/step_000070": GPUS,
        "vllm serve openai/gpt-oss-120b": GPUS,
    },
    "docs/evidence.md": {
        'pip install -e ".[bench]"': INSTALLS,
        "python examples/evidence/run.py": HOURS,
        "python examples/evidence/signals.py": MINUTES,
    },
    "docs/parallel.md": {
        "spell convert hf-to-megatron --hf openai/gpt-oss-20b": HUB,
        "spell convert megatron-to-hf --megatron gpt-oss-20b-megatron": HUB,
        "python benchmarks/push_overhead.py": MINUTES,
    },
    "docs/recipes.md": {"spell train --config examples/paper_16k.yaml": GPUS},
    "docs/report.md": {"python -m pytest": TESTS},
    "docs/verification.md": {"benchmarks/gpu/run.sh": GPUS, "python -m pytest": TESTS},
    "examples/evidence/rich/README.md": {
        "python tools/make_rich_policy.py": MINUTES,
        "python examples/evidence/run.py": HOURS,
    },
    "examples/evidence/smollm2/README.md": {
        "python examples/evidence/smollm2/get_policy.py": INSTALLS,
        "spell train --config examples/evidence/smollm2/run.yaml": HOURS,
        "spell evaluate --model examples/evidence/smollm2/policy": AFTER,
        "spell evaluate --model runs/smollm2/checkpoints/step_000006": AFTER,
        "python examples/evidence/smollm2/summary.py runs/smollm2": AFTER,
    },
    "examples/quickstart/README.md": {
        "python tools/make_seed_policy.py": MINUTES,
        "spell train --config examples/quickstart.yaml --run.name=seed0": SAME,
        "spell train --config examples/quickstart.yaml --run.name=recipe1": SAME,
    },
}
"""Page → beginning of a command → why it is not run."""


def reason(page: str, command: Command) -> str:
    """Why a command is not run; "" if it is."""
    named = NOT_RUN.get(page, {})
    return next((why for start, why in named.items() if command.text.startswith(start)), "")


def to_run(page: str) -> list[Command]:
    (path,) = (path for path in PAGES if name_of(path) == page)
    return [command for command in commands(path) if not reason(page, command)]
