"""`spell init`: write the settings of a new run, or copy an example."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_number, loose_words, overrides_of, quiet_libraries
from spell_megatron.errors import UserError
from spell_megatron.planner.gpus import GPUS

EXAMPLES = ("quickstart",)


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "init",
        run,
        help="write the settings of a new run for a model, documents and GPUs",
        usage="spell init FILE --model MODEL --documents FILE [--gpu NAME --gpus N] [--SECTION.KEY=VALUE ...]\n"
        "       spell init --example quickstart [FOLDER]",
        description="Write a file of settings with comments for a model, documents and the hardware of this machine or "
        "the one named: limits by the lengths of the documents, the layout by the planner. Settings on the command "
        "line are written into it and count for the rest. With --example, copy an example that runs without a GPU.",
        takes_settings=True,
    )
    add = parser.add_argument
    add("out", nargs="?", type=Path, metavar="FILE", help="file of settings to write (default run.yaml), or folder")
    add(
        "--model",
        type=Path,
        metavar="MODEL",
        help="folder of a model, or its name at the hub (ORG/NAME[@REVISION])",
    )
    add("--documents", type=Path, metavar="FILE", help="clusters of documents, as `spell prepare` writes them")
    add("--gpu", metavar="NAME", help=f"{', '.join(GPUS)} (default: what this machine has)")
    add_number(add, "--gpus", None, "number of GPUs of trainer and engines together (default 8, or this machine's)")
    add_number(add, "--gpus-per-node", 8, "GPUs of each node")
    add("--example", choices=EXAMPLES, help="copy this example to FOLDER (default: its name)")
    parser.set_defaults(needs_config=False, config=None)


def run(arguments: argparse.Namespace) -> int:
    if arguments.config:  # a name that ends in .yaml and stands behind other words
        arguments.out = arguments.out or arguments.config[0]
    loose, settings = loose_words(arguments.rest)
    if arguments.out is None and loose:
        arguments.out = Path(loose.pop())
    overrides = overrides_of([*loose, *settings])
    if arguments.example:
        return _copy(arguments.example, arguments.out or Path(arguments.example))
    if arguments.model is None or arguments.documents is None:
        raise UserError(
            "A run needs a model and documents: give --model MODEL and --documents FILE. Or begin with an example: "
            "spell init --example quickstart."
        )
    return _write(arguments, arguments.out or Path("run.yaml"), overrides)


def _write(arguments: argparse.Namespace, out: Path, overrides: list[str]) -> int:
    _refuse_existing(out)
    quiet_libraries()
    from spell_megatron.config.commented import commented_yaml
    from spell_megatron.files import write_text
    from spell_megatron.hub import fetch_model
    from spell_megatron.planner.draft import Hardware, draft, hardware_here
    from spell_megatron.planner.gpus import find_gpu

    if arguments.gpu:
        gpus = arguments.gpus or 8
        hardware = Hardware(find_gpu(arguments.gpu), gpus, min(arguments.gpus_per_node, gpus))
    else:
        hardware = hardware_here(arguments.gpus_per_node)
        if arguments.gpus and not hardware.gpu:
            raise UserError("This machine has no GPU. Name the kind that the run will have with --gpu.")
    model = fetch_model(arguments.model, weights=False)
    found = draft(model, arguments.documents, hardware, overrides)
    settings = {"run.name": out.stem} | found.settings
    head = [
        f"Settings of a run on {hardware}, written by `spell init`. What is not here has its default:",
        "`spell train --help` explains all settings, and every one can be given on the command line.",
        *found.remarks,
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, commented_yaml(settings, head))
    print("\n".join([f"{out}: settings of a run on {hardware}", *found.remarks]))
    print(f"Look at what would be started:  spell train {out} --dry-run\nTrain:  spell train {out}")
    return 0


def _copy(example: str, folder: Path) -> int:
    """Copy an example's files; its settings name them beside themselves."""
    import shutil

    from spell_megatron.files import appearing_folder, write_text

    source = _examples()
    _refuse_existing(folder)
    with appearing_folder(folder) as partial:
        shutil.copytree(source / example, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
        text = (source / f"{example}.yaml").read_text(encoding="utf-8").replace(f"examples/{example}/", "")
        write_text(partial / "run.yaml", text.replace(" Run it with `make quickstart`.", ""))
    print(f"{folder}: the example {example}\nTrain:  spell train {folder / 'run.yaml'}")
    return 0


def _examples() -> Path:
    """The folder of the examples: in an installed package, or beside it in a clone of the repository."""
    import spell_megatron

    package = Path(spell_megatron.__file__).parent
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise UserError("This installation has no examples. Install spell_megatron again, or clone its repository.")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already. Choose another name, or move it away.")
