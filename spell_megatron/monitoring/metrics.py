"""Numbers of a run, one record per step: JSON lines, TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spell_megatron.config.schema import LoggingConfig
from spell_megatron.errors import UserError
from spell_megatron.files import json_lines, write_text


class MetricsLogger:
    """Writes `metrics.jsonl` and `tensorboard/` in the run folder (and to Weights & Biases).

    When a run is resumed, what it had logged after its last checkpoint is removed, so that no step is there twice.
    """

    def __init__(
        self,
        run_folder: Path,
        logging: LoggingConfig,
        settings: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> None:
        """
        Args:
            settings: of the run, as JSON values; Weights & Biases keeps them.
            resume_step: step of the checkpoint that the run continues from; None for a new run.

        Raises:
            UserError: Weights & Biases is asked for, and not installed or does not take the run.
        """
        run_folder.mkdir(parents=True, exist_ok=True)
        self._path = run_folder / "metrics.jsonl"
        self._last: dict[str, Any] = {}
        self._last_at = 0
        self._truncate(-1 if resume_step is None else resume_step)
        self._tensorboard = _tensorboard(run_folder, resume_step)
        self._wandb = _wandb(run_folder, logging, settings) if logging.wandb else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics of a step: numbers (also 0-d arrays and tensors) or texts, by flat name.

        A step has one line in the file: what is logged for the same step right after is added to it.
        JSON has no NaN: numbers that are not finite are null there.
        """
        plain = {name: _plain(value) for name, value in metrics.items()}
        record: dict[str, Any] = {name: _finite(value) for name, value in plain.items()}
        with self._path.open("ab") as file:
            if self._last.get("step") == step:
                file.truncate(self._last_at)
                record = self._last | record
            else:
                record = {"step": step, "time": round(time.time(), 3)} | record
            self._last, self._last_at = record, file.seek(0, os.SEEK_END)
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        for name, value in plain.items():
            if not isinstance(value, str):
                self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **plain})

    def has(self, step: int, name: str) -> bool:
        """Whether a step, the last one with metrics, has one of this name."""
        return self._last.get("step") == step and name in self._last

    def close(self) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _truncate(self, last_step: int) -> None:
        """Remove records after a step, and a last line that a crash cut short."""
        if not self._path.exists():
            return
        kept = [record for record in read_records(self._path) if record["step"] <= last_step]
        *before, last = ["", *(json.dumps(record) + "\n" for record in kept)]
        write_text(self._path, "".join([*before, last]))
        if kept:
            self._last, self._last_at = kept[-1], len("".join(before).encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. Lines that a crash has cut or filled with something else are left out."""
    rows = (row for _, row, _ in json_lines(path) if isinstance(row, dict))
    return [row for row in rows if isinstance(row.get("step"), int)]


def _plain(value: Any) -> int | float | str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, bool | int) else float(value)


def _finite(value: int | float | str) -> int | float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(run_folder: Path, resume_step: int | None):
    from torch.utils.tensorboard import SummaryWriter  # here: torch takes seconds to import

    # purge_step hides what was logged from that step on
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge)


def _wandb(run_folder: Path, logging: LoggingConfig, settings: Mapping[str, Any]):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging.wandb is true, but the wandb package cannot be imported. Install it (pip install "
            "wandb), or set logging.wandb to false."
        ) from error
    try:
        run = wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            group=logging.wandb_group,
            tags=logging.wandb_tags,
            mode="offline" if logging.wandb_offline else None,
            name=settings["run"]["name"],
            id=_wandb_id(run_folder / "wandb_id.txt"),
            resume="allow",
            dir=str(run_folder),
            config=dict(settings),
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases does not take the run: {error}. Log in with `wandb login`, correct "
            "logging.wandb_project and wandb_entity, or set logging.wandb_offline to true."
        ) from error
    # its own step counter cannot go back, which a resumed run does
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(path: Path) -> str:
    """The run's name at Weights & Biases; a new one if there is none yet, or a crash has damaged the file."""
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if not known.isalnum():
        known = uuid.uuid4().hex
        write_text(path, known)
    return known
