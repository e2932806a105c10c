"""What is left to do for a run that is to be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spell_megatron.checkpoint.folder import latest, read_meta
from spell_megatron.config.faults import Fault
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.monitoring.metrics import read_records
from spell_megatron.plural import counted

VALIDATED = "validation/pass@1"
"""A metric of each validation."""


def steps_fault(config: Config, checkpoint: Path | None, new: bool = False) -> Fault | None:
    """What is wrong with run.steps for a run that goes on from a checkpoint; None if nothing, or if it is damaged.

    new: the run is a new one, which begins with this checkpoint of another one.
    """
    meta, steps = _meta(checkpoint), config.run.steps
    made = meta.get("step", -1)
    if made == steps > 0 and not new and not meta["updates"]:
        return Fault.of(
            "run.steps",
            f"the run has made its {counted(steps, 'step')}, and none of them changed the weights. The lines about "
            "its steps, and logs/train.log in its folder, say why. Correct that, and start a new run",
        )
    if made < steps or (made == steps and not new):
        return None
    return Fault.of(
        "run.steps",
        f"the run has made {counted(made, 'step')} already, and this is {steps}. Give it more than {made} to train "
        "on, or begin a new run at an earlier step with --resume RUN_FOLDER@STEP",
    )


def finished(config: Config) -> str:
    """For users, that the run in the folder of these settings has made all its steps; "" if something is left to do."""
    folder = config.run.output_dir / config.run.name
    steps = config.run.steps
    try:
        made = _meta(latest(folder)).get("step")
    except UserError:  # preflight tells it
        return ""
    if made != steps or (config.validation.due(steps, steps) and not _validated(folder / "metrics.jsonl", steps)):
        return ""
    return (
        f"{folder}: this run has made its {counted(steps, 'step')}, so there is nothing to do. To train longer, give "
        f"it more: spell train --resume {folder} --run.steps={max(1, 2 * steps)}"
    )


def _meta(checkpoint: Path | None) -> dict[str, Any]:
    """What meta.json of a checkpoint says; {} if there is none, or it is damaged."""
    try:
        return {} if checkpoint is None else read_meta(checkpoint)
    except UserError:
        return {}


def _validated(metrics: Path, step: int) -> bool:
    if not metrics.is_file():
        return False
    return any(row["step"] == step and VALIDATED in row for row in read_records(metrics))
