"""Runs that tests strike at a chosen moment of a step: the trainer is held there, so that the blow falls in it."""

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from small_run import command, left_over, start

MOMENTS = ("rollout", "accumulation", "update")
"""A rollout of which nothing has been accumulated; one of which something has; what is left of the update after it."""


class HeldRun:
    """A run of its own process, or processes.

    Args:
        folder: the run's.
        arguments, options: of `small_run.start`.
    """

    def __init__(self, folder: Path, *arguments: str, **options: object) -> None:
        self.folder = folder
        latest = folder / "checkpoints" / "latest"
        self._done = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
        self._log, self._timeline = folder / "logs" / "train.log", folder / "timeline.jsonl"
        self._before = {path: len(_text(path)) for path in (self._log, self._timeline)}
        self._temporary = tempfile.TemporaryDirectory(prefix="t")  # sockets need a short path
        options |= {"TMPDIR": self._temporary.name, "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "compiled")}
        self.process: subprocess.Popen = start(*arguments, "--logging.level=debug", **options)
        self._family: set[int] = set()
        self._torchrun = "program" in options  # it leaves a folder

    def said_since(self, path: Path) -> str:
        """What this start has added to a file."""
        return _text(path)[self._before[path] :]

    def moment(self) -> tuple[int, str]:
        """The step, and which of MOMENTS it is in, or another stage; ended stages have the name ""."""
        stages = re.findall(r"progress: (.+) (begins|took)", self.said_since(self._log))
        step = self._done + stages.count(("rollout", "begins"))
        name, what = stages[-1] if stages else ("", "took")
        lines = [json.loads(line) for line in self.said_since(self._timeline).splitlines() if line.endswith("}")]
        if name == "rollout" and any(line["step"] == step and line["name"] == "accumulate" for line in lines):
            name = "accumulation"
        return step, name if what == "begins" else ""

    @contextlib.contextmanager
    def held(self, step: int, moment: str) -> Iterator[None]:
        """Rank 0 is held at this moment during the block."""
        rank_0 = None
        while True:
            now = self.moment()
            if now[1] in MOMENTS:
                rank_0 = rank_0 or self.ranks()[0]
            if rank_0 and now == (step, moment):
                rank_0.suspend()
                try:
                    if self.moment() == (step, moment):
                        self._family = {p.pid for p in self.everything()}
                        yield
                        return
                finally:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank_0.resume()
            status = self.process.poll()
            assert status is None and now[0] <= step, (status, now, self.process.communicate())
            time.sleep(0.005)

    def everything(self) -> list[psutil.Process]:
        """All processes of the run."""
        run = psutil.Process(self.process.pid)
        return [run, *run.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """The trainer's processes, in the order of their ranks."""
        ranks = {int(p.environ().get("RANK", -1)): p for p in self.everything() if "train" in command(p)}
        ranks = {rank: p for rank, p in ranks.items() if rank >= 0}
        return [ranks[rank] for rank in sorted(ranks)] or [psutil.Process(self.process.pid)]

    def selfplay(self) -> psutil.Process:
        """The process for self-play."""
        (found,) = (p for p in self.everything() if "spell_megatron.director.process" in command(p))
        return found

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it has printed; nothing of it is left a minute later."""
        output = "".join(self.process.communicate(timeout=600))
        deadline = time.monotonic() + 60
        while left := left_over():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        left = {path.name.partition("-")[0].partition("_")[0] for path in Path(self._temporary.name).iterdir()}
        # Of Python, which a process that is killed cannot remove, and of torchrun.
        assert left <= ({"pymp", "torchelastic"} if self._torchrun else {"pymp"}), left
        self._temporary.cleanup()
        assert not [path for path in Path("/dev/shm").iterdir() if self._ours(path)]
        return self.process.returncode, output

    def _ours(self, shared: Path) -> bool:
        """Whether shared memory has the number of one of its processes in its name, and is more than a semaphore, of
        which an engine that is killed leaves one (of joblib, 32 bytes)."""
        numbers = {int(number) for number in re.findall(r"\d+", shared.name)}
        return bool(numbers & self._family) and not shared.name.startswith("sem.")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
