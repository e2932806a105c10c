"""What can be known to go wrong with the engines of an evaluation before they are started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spell_megatron.config.faults import raise_faults
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.preflight.cpu_kernels import check_cpu_kernels
from spell_megatron.preflight.engine_model import (
    LENGTH_FIELDS,
    check_engine_model,
    check_generation_config,
    check_positions,
    position_limit,
)
from spell_megatron.preflight.engines import check_engine_urls, check_ports
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.machine import uses_gpus
from spell_megatron.training.policy import PolicyModel

LIMITS = ("--max-input", "--max-output")
"""What the command calls the longest prompt and the longest response."""


def check_evaluation(config: Config) -> None:
    """UserError that lists all faults of model, limits, ports and addresses.

    Models of families that cannot be trained are evaluated too: of them only the positions are checked.
    """
    found, path, rollout = Findings(), config.model.path, config.rollout
    check_engine_urls(found, rollout.urls)
    check_ports(found, rollout)
    check_generation_config(found, path)
    try:
        policy = PolicyModel.load(path, config.model.dtype)
        check_engine_model(found, path, policy)
        if not uses_gpus(config):
            check_cpu_kernels(found, config, policy.arch)
        hf_config = policy.hf_config
    except UserError:
        hf_config = _any_config(path)
    if hf_config is not None:
        check_positions(found, rollout.sampling, hf_config, LIMITS)
    raise_faults(found.faults, "the evaluation")


def positions(model: Path) -> int | None:
    """Number of tokens that vLLM serves in a sequence of a model of any family, if its config.json tells."""
    config = _any_config(model)
    return None if config is None else position_limit(config)[0]


def _any_config(path: Path) -> Any:
    """What transformers makes of a config.json of any family; None if it knows none, or no number of positions."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config()
    except Exception:  # vLLM knows families that transformers does not, and says what is wrong with the others
        return None
    return config if any(getattr(config, name, None) for name in LENGTH_FIELDS) else None
