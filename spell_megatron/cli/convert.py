"""`spell convert`: between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_number, quiet_libraries

SIZES = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "etp": "expert_tensor"}
"""Flags of the parallel sizes, and their names in `ParallelConfig`."""


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        help="turn a Hugging Face checkpoint into a Megatron one, and back",
        description="Turn a Hugging Face checkpoint into a Megatron distributed checkpoint, and back, tensor by "
        "tensor: memory stays small whatever the model's size. The result appears when it is complete.",
    )
    ways = parser.add_subparsers(metavar="WAY", required=True)
    forth = _add_way(ways, "hf", "megatron", "safetensors to a distributed checkpoint")
    _add_way(ways, "megatron", "hf", "a distributed checkpoint, or a step of a run, to safetensors")
    for flag, size in SIZES.items():
        meaning = f"{size.replace('_', '-')}-parallel size that the pieces are cut for; any other one loads them, too"
        add_number(forth.add_argument, f"--{flag}", 1, meaning)


def _add_way(ways: Any, source: str, target: str, help: str) -> argparse.ArgumentParser:
    way = ways.add_parser(f"{source}-to-{target}", help=help, allow_abbrev=False)
    read = "folder to read" + (", or ORG/NAME[@REVISION] of the hub" if source == "hf" else "")
    way.add_argument(f"--{source}", required=True, type=Path, metavar="IN", help=read)
    way.add_argument(f"--{target}", required=True, type=Path, metavar="OUT", help="folder to make")
    way.add_argument("--verify", action="store_true", help="afterwards compare every tensor of both, bit by bit")
    way.set_defaults(command=run, takes_settings=False, target=target)
    return way


def run(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    from spell_megatron.config.schema import ParallelConfig
    from spell_megatron.hub import fetch_model
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.weights import convert

    progress, out = Progress(), getattr(arguments, arguments.target)
    if arguments.target == "megatron":
        arguments.hf = fetch_model(arguments.hf)
    with progress.stage("converting") as advance:
        if arguments.target == "megatron":
            layout = ParallelConfig(**{size: getattr(arguments, flag) for flag, size in SIZES.items()})
            untrained = convert.hf_to_megatron(arguments.hf, out, layout, advance)
        else:
            untrained = convert.megatron_to_hf(arguments.megatron, out, advance)
    if untrained:
        print(f"{out}: {untrained} are not trained and were copied as they are")
    if not arguments.verify:
        print(f"{out}: done")
        return 0
    with progress.stage("comparing") as advance:
        count = convert.compare(arguments.megatron, arguments.hf, advance)
    print(f"{out}: done; all {count} tensors are the same in both")
    return 0
