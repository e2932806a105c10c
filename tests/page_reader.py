"""A reader of the pages: runs their commands as they are written, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import requests
import yaml
from page_commands import Command
from small_run import MARK, ROOT


class Reader:
    """A clone of the repository with an environment in which `spell`, `python` and `make` are those of the clone.

    A context manager: leaving it ends what the commands have left running.

    Args:
        folder: becomes the clone; no commands write outside it.
        environment: that of a hub, say; without it, that of this process. Its paths are replaced.
        smaller: settings for the clone's examples/quickstart.yaml.
        more: words behind the commands that begin with a key.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        smaller: Sequence[str] = (),
        more: dict[str, Sequence[str]] | None = None,
    ) -> None:
        self.folder, self._more = folder, more or {}
        clone(folder)
        if smaller:
            make_smaller(folder / "examples" / "quickstart.yaml", smaller)
        programs = folder / ".venv" / "bin"
        own = {"PYTHONPATH": str(folder), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "SPELL_TEST": MARK}
        own["PATH"] = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**(environment or os.environ), **own}
        self._exports: list[str] = []
        self._staying: list[subprocess.Popen] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, command: Command) -> str:
        """What it prints. `cat FILE` makes the file that the page shows; a command that stays is waited for."""
        if command.text.startswith("export "):
            self._exports.append(command.text)
        if command.text.startswith("cat "):
            (self.folder / command.text.split()[1]).write_text(command.shows + "\n", encoding="utf-8")
        words = next((more for start, more in self._more.items() if command.text.startswith(start)), ())
        text = " ".join(filter(None, [command.text, shlex.join(words)]))
        script = ["bash", "-c", "\n".join([*self._exports, f"exec {text}" if command.stays else text])]
        if command.stays:
            self._start(script, command.text)
            return ""
        done = subprocess.run(script, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def end(self) -> None:
        """End what stays, and forget what was exported: the reader opens another shell."""
        for process in self._staying:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in self._staying:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._staying.clear()
        self._exports.clear()

    def _start(self, script: list[str], text: str) -> None:
        port = int((re.search(r"port[= ](\d+)", text) or ["", "8000"])[1])
        with socket.socket() as taken:
            assert taken.connect_ex(("127.0.0.1", port)), f"port {port}, which the page uses, is taken"
        log = self.folder / f"port-{port}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                script, cwd=self.folder, env=self._environment, stdout=out, stderr=out, start_new_session=True
            )
        self._staying.append(process)
        while not _answers(port):
            assert process.poll() is None, f"{text}\n{log.read_text()[-3000:]}"
            time.sleep(0.2)


def clone(folder: Path) -> None:
    """Copy what a clone of the repository has, with programs for an environment that is there already."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():  # not removed since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "spell": " -m spell_megatron"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (programs / name).chmod(0o755)


def make_smaller(file: Path, overrides: Sequence[str]) -> None:
    """Write overrides (`--SECTION.KEY=VALUE`) into a file of settings."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    for override in overrides:
        name, _, value = override.removeprefix("--").partition("=")
        *sections, key = name.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")


def _answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.RequestException:
        return False
