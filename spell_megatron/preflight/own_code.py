"""Code of the user's own, which settings name: it is there, and works on small examples of what it will get.

It is tried in a process like the one of self-play, without torch; what it does there leaves the trainer alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spell_megatron.config.selfplay_sections import TASKS, SelfPlayConfig
from spell_megatron.preflight.findings import Findings
from spell_megatron.selfplay.tasks import OwnTask, own_reward, own_rule, right_or_wrong

EXAMPLES = {"docmath_qa": ("42", "7"), "doc_general_qa": ("Ada Lovelace", "Alan Turing"), "doc_mc": ("B", "C")}
"""Two answers of each built-in task, as rule checks get them."""

_SECONDS = 120.0
"""How long all of it may take."""


def check_own_code(found: Findings, play: SelfPlayConfig) -> Mapping[str, Path] | None:
    """Try the code of the user's own; the folders with the prompts of own tasks, None if something is wrong."""
    if not play.own_code:
        return {}
    keys, names = " ".join([*play.own_code, "selfplay.code"]), " and ".join(play.own_code.values())
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "spell_megatron.preflight.own_code", str(answer)]
        try:
            ended = subprocess.run(
                command,
                input=play.model_dump_json().encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            found.fault(keys, f"{names} did not come to an end within {_SECONDS:g} seconds. Make them faster")
            return None
        if ended.returncode or not answer.exists():
            last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2] or "it said nothing"
            found.fault(keys, f"trying {names} ended Python with status {ended.returncode}: {last}. Correct the code")
            return None
        said = json.loads(answer.read_text(encoding="utf-8"))
    for setting, message in said["faults"]:
        found.fault(setting, message)
    return None if said["faults"] else {name: Path(path) for name, path in said["prompts"].items()}


def try_own_code(play: SelfPlayConfig) -> dict[str, Any]:
    """Call each function in this process: {"faults": [[keys, message], ...], "prompts": {task: folder}}."""
    found, prompts = Findings(), {}
    found.attempt("selfplay.rule selfplay.code", lambda: _try_rule(play))
    found.attempt("selfplay.questioner.reward selfplay.code", lambda: _try_reward(play))
    for name in play.own_tasks:
        prompts[name] = found.attempt(f"selfplay.own_tasks.{name} selfplay.code", _trial(play, name))
    return {"faults": [[" ".join(fault.keys), fault.message] for fault in found.faults], "prompts": prompts}


def _try_rule(play: SelfPlayConfig) -> None:
    if rule := own_rule(play):
        for task in TASKS:
            for prediction in EXAMPLES[task]:
                right_or_wrong(rule, task, prediction, EXAMPLES[task][0])


def _try_reward(play: SelfPlayConfig) -> None:
    """The reward is in range for every mean that the answers to a question can have."""
    if reward := own_reward(play):
        for right in range(1, play.group_size):
            reward(right / play.group_size, "Who wrote the first program?", "Ada Lovelace")


def _trial(play: SelfPlayConfig, name: str) -> Callable[[], str]:
    def prompts() -> str:
        task = OwnTask(play, name)
        task.question({"question": "Who wrote the first program?", "answer": "Ada Lovelace"})
        task.question({})
        task.answer("The answer is Ada Lovelace.")
        task.answer("")
        task.score("Ada Lovelace", "Ada Lovelace")
        task.score("Alan Turing", "Ada Lovelace")
        return str(task.prompts.absolute())

    return prompts


def main() -> None:
    """Try the code of the settings on the standard input, and write what was found to the file of the first word."""
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # as in the process of self-play
    if sys.path[0] == os.getcwd():  # by `python -m`; a run that is resumed elsewhere or in a job has another one
        del sys.path[0]
    said = try_own_code(SelfPlayConfig.model_validate_json(sys.stdin.read()))
    Path(sys.argv[1]).write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
