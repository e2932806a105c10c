"""Which folder holds the policy that a user names."""

from __future__ import annotations

from pathlib import Path

from spell_megatron.errors import UserError
from spell_megatron.hub import fetch_model


def policy_folder(given: Path, weights: bool = True) -> tuple[Path, Path | None]:
    """(folder of the Hugging Face checkpoint, file with the settings of the run that made it, if there is one).

    Args:
        given: a checkpoint's folder, a model of the hub, or a step of a run.
        weights: else only its configuration and tokenizer are needed, and the latter may do.

    Raises:
        UserError: there is no model.
    """
    given = fetch_model(given, weights)
    model = given / "hf" if (given / "hf" / "config.json").is_file() else given
    if weights and not (model / "config.json").is_file():
        raise UserError(
            f"There is no model in {model}: it has no config.json. Give a step of a run, the folder of a Hugging Face "
            "checkpoint, or the name of a model of the hub (ORG/NAME)."
        )
    of_run = model.absolute().parent / "config.json"
    return model, of_run if model.name == "hf" and of_run.is_file() else None
