"""`spell completion`: words that a shell completes, from the parsers of all commands and from the settings."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from spell_megatron.cli.arguments import add_command
from spell_megatron.config.help import all_settings

_SCRIPT = """\
# eval "$(spell completion {shell})"
{head}_spell() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words={commands}
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ ${{COMPREPLY[0]-}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o default -F _spell spell
"""
_HEADS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "completion",
        run,
        help="print what makes a shell complete commands, options and settings",
        description="Print a script that makes a shell complete commands, options and settings. Put "
        'eval "$(spell completion bash)" into ~/.bashrc, or the same with zsh into ~/.zshrc.',
    )
    parser.add_argument("shell", choices=_HEADS)
    parser.set_defaults(parsers=commands.choices)


def run(arguments: argparse.Namespace) -> int:
    settings = [f"--{setting.key}=" for setting in all_settings()]
    cases = []
    for name, parser in arguments.parsers.items():
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        words = [*options, *(settings if parser.get_default("takes_settings") else ())]
        cases.append(f"            {name}) words={shlex.quote(' '.join(words))} ;;")
    print(
        _SCRIPT.format(
            shell=arguments.shell,
            head=_HEADS[arguments.shell],
            commands=shlex.quote(" ".join(arguments.parsers)),
            cases="\n".join(cases),
        ),
        end="",
    )
    return 0
