"""`spell convert`: between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spell_megatron.cli.arguments import quiet_libraries
from spell_megatron.errors import UserError


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a Hugging Face checkpoint into a Megatron one, and back",
        allow_abbrev=False,
        description="Turn a Hugging Face checkpoint into a Megatron distributed checkpoint, and back, tensor by "
        "tensor: memory stays small whatever the model's size. The result appears when it is complete.",
    )
    ways = parser.add_subparsers(metavar="WAY", required=True)
    forth = ways.add_parser("hf-to-megatron", help="safetensors to a distributed checkpoint", allow_abbrev=False)
    back = ways.add_parser(
        "megatron-to-hf",
        help="a distributed checkpoint, or a step of a run, to safetensors",
        allow_abbrev=False,
    )
    for way, source, target in ((forth, "hf", "megatron"), (back, "megatron", "hf")):
        way.add_argument(f"--{source}", required=True, type=Path, metavar="IN", help="folder to read")
        way.add_argument(f"--{target}", required=True, type=Path, metavar="OUT", help="folder to make")
        way.add_argument("--verify", action="store_true", help="afterwards compare every tensor of both, bit by bit")
        way.set_defaults(command=run, takes_settings=False, way=f"{source}-to-{target}")
    for flag, meaning in (
        ("tp", "tensor"),
        ("pp", "pipeline"),
        ("ep", "expert"),
        ("etp", "expert-tensor"),
    ):
        forth.add_argument(
            f"--{flag}",
            type=int,
            default=1,
            metavar="N",
            help=f"{meaning}-parallel size that the pieces are cut for (any other one loads them too; default 1)",
        )


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    quiet_libraries()
    from spell_megatron.config.schema import ParallelConfig
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.weights import convert

    sizes = {flag: getattr(arguments, flag, 1) for flag in ("tp", "pp", "ep", "etp")}
    for flag, size in sizes.items():
        if size < 1:
            raise UserError(f"--{flag} is {size}; it must be 1 or more.")
    progress = Progress()
    with progress.stage("converting") as advance:
        if arguments.way == "hf-to-megatron":
            layout = ParallelConfig(
                tensor=sizes["tp"], pipeline=sizes["pp"], expert=sizes["ep"], expert_tensor=sizes["etp"]
            )
            convert.hf_to_megatron(arguments.hf, arguments.megatron, layout, advance)
            out = arguments.megatron
        else:
            convert.megatron_to_hf(arguments.megatron, arguments.hf, advance)
            out = arguments.hf
    if arguments.verify:
        with progress.stage("comparing") as advance:
            count = convert.compare(arguments.megatron, arguments.hf, advance)
        print(f"{out}: done; all {count} tensors are the same in both")
    else:
        print(f"{out}: done")
    return 0
