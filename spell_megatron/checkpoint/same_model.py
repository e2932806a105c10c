"""Whether a checkpoint is of the model that a run is to go on with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spell_megatron.checkpoint.folder import go_on_without
from spell_megatron.errors import UserError
from spell_megatron.tokenizer import PolicyTokenizer, tokenizer_files
from spell_megatron.training.policy import PolicyModel


def check_same_model(folder: Path, policy: PolicyModel) -> None:
    """UserError if a checkpoint was made with another architecture or tokenizer than the policy's.

    Megatron itself loads a vocabulary of another size, whose padding may be the same, and ignores tensors in excess.
    The weights in the policy's folder may be others: those of the checkpoint count.
    """
    saved = folder / "hf"
    try:
        model, tokenizer = PolicyModel.load(saved), PolicyTokenizer(saved) if tokenizer_files(saved) else None
    except UserError as error:
        raise UserError(f"The checkpoint {folder} is damaged. {error} {go_on_without(folder)}.") from error
    ours, theirs = _traits(policy), _traits(model)
    different = [f"{name} {theirs[name]} (now {ours[name]})" for name in theirs if theirs[name] != ours[name]]
    if not different and policy.folder and tokenizer:
        different = tokenizer.differences(PolicyTokenizer(policy.folder))
    if different:
        raise UserError(
            f"The checkpoint {folder} was made with another model than that of model.path: {', '.join(different)}. Set "
            f"model.path to the model that the run began with, or to {saved}, which has the same configuration and "
            "tokenizer."
        )


def _traits(model: PolicyModel) -> dict[str, Any]:
    """What two models must have in common so that the same weights compute the same."""
    of = model.hf_config
    more = {"rope_parameters": of.rope_parameters, "rms_norm_eps": of.rms_norm_eps}
    more["whole model"] = model.whole and model.whole.model_type
    return {"model_type": of.model_type, **asdict(model.arch), **more}
