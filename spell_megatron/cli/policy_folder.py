"""Which folder holds the policy that a user names."""

from __future__ import annotations

from pathlib import Path


def policy_folder(given: Path) -> tuple[Path, Path | None]:
    """(folder of the Hugging Face checkpoint, file with the settings of the run that made it, if there is one).

    given: a checkpoint's folder, or a step of a run.
    """
    model = given / "hf" if (given / "hf" / "config.json").is_file() else given
    of_run = model.absolute().parent / "config.json"
    return model, of_run if model.name == "hf" and of_run.is_file() else None
