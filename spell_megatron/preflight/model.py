"""The model's folder, and what the model cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spell_megatron.config.schema import Config, RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.preflight.cpu_kernels import check_cpu_kernels
from spell_megatron.preflight.engine_model import (
    check_engine_model,
    check_generation_config,
    check_positions,
    quantization_fault,
)
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.machine import is_installed, uses_gpus

if TYPE_CHECKING:
    from spell_megatron.tokenizer import PolicyTokenizer
    from spell_megatron.training.policy import Architecture, PolicyModel


def check_model_folder(found: Findings, path: Path, dtype: str) -> tuple[PolicyModel | None, PolicyTokenizer | None]:
    """Configuration, weights and tokenizer are complete.

    Returns what config.json says, and the tokenizer; None for one that cannot be used.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        found.fault(
            "model.path",
            f"the folder {path} {kind}. Give the folder of a Hugging Face checkpoint, or the whole name "
            "of a model of the hub (ORG/NAME). Relative paths are taken from the current directory, then from the "
            "folder of the YAML file",
        )
        return None, None
    # transformers takes seconds to import: not before the folder is known to exist
    from spell_megatron.tokenizer import PolicyTokenizer
    from spell_megatron.training.policy import PolicyModel
    from spell_megatron.weights.side_files import read_side_files
    from spell_megatron.weights.weight_files import weight_file_faults

    incomplete = list(weight_file_faults(path))
    for message in incomplete:
        found.fault("model.path", message)

    found.attempt("model.path", lambda: read_side_files(path))
    policy = found.attempt("model.path", lambda: PolicyModel.load(path, dtype))
    if policy is not None:
        check_engine_model(found, path, policy)
        check_generation_config(found, path)
        if not incomplete:
            check_weights(found, path, policy)
    tokenizer = None
    if policy is not None or not (path / "config.json").exists():  # it reads that file too
        tokenizer = found.attempt("model.path", lambda: PolicyTokenizer(path))
    if policy is not None and tokenizer is not None and tokenizer.vocab_size > policy.arch.vocabulary:
        found.fault(
            "model.path",
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only "
            f"{policy.arch.vocabulary}. Use the tokenizer that belongs to the model",
        )
    return policy, tokenizer


def check_resumed_model(found: Findings, checkpoint: Path, policy: PolicyModel) -> None:
    """The checkpoint that a run goes on from is complete, and of this model."""
    from spell_megatron.checkpoint.folder import read_meta, read_state
    from spell_megatron.checkpoint.same_model import check_same_model

    files = found.attempt("run.name", lambda: (read_meta(checkpoint), read_state(checkpoint)))
    if files is not None:
        found.attempt("model.path", lambda: check_same_model(checkpoint, policy))


def check_weights(found: Findings, folder: Path, policy: PolicyModel) -> None:
    """The stored tensors are those that config.json describes."""
    from spell_megatron.weights.hf_checkpoint import Checkpoint

    fault, plain = None, False
    try:
        with Checkpoint(folder, policy) as checkpoint:
            checkpoint.check(set(checkpoint.files))
            plain = not checkpoint.packed
    except UserError as error:
        fault = error
    quantization = quantization_fault(folder, policy, plain)
    if quantization or fault:
        found.fault("model.path", quantization or str(fault))


def check_lengths(found: Findings, config: Config, policy: PolicyModel) -> None:
    """Prompts and responses fit the model's positions and a microbatch."""
    check_positions(found, config.rollout.sampling, policy.hf_config)
    sampling, budget = config.rollout.sampling, config.training.tokens_per_microbatch
    if sampling.max_prompt_tokens + sampling.max_response_tokens > budget:
        found.warn(
            f"training.tokens_per_microbatch = {budget} is less than the longest row, max_prompt_tokens "
            f"+ max_response_tokens = {sampling.max_prompt_tokens + sampling.max_response_tokens}. Such rows are "
            "microbatches of up to an eighth more tokens than they have, and may need more memory than you planned for"
        )


def check_heads(found: Findings, config: Config, arch: Architecture) -> None:
    """Trainer and engines can divide the model, and the engines serve its size of attention heads."""
    from spell_megatron.training.layout import layout_faults

    rollout = config.rollout
    if not uses_gpus(config):
        check_cpu_kernels(found, config, arch)
    if arch.delta_net:
        _check_linear_layers(found, config)
    if arch.biased_experts and not rollout.urls:
        _check_biased_experts(found, config.rollout)
    found.faults += layout_faults(arch, config.training.parallel)
    if not rollout.urls:
        _check_cuts(found, rollout.tensor_parallel, arch)


def _check_cuts(found: Findings, tensor: int, arch: Architecture) -> None:
    """The workers of an engine can cut every layer."""
    cut = {"attention heads": arch.heads}
    if arch.groups % tensor and (arch.biased_experts or tensor % arch.groups):  # workers of others may share one
        cut["key-value heads"] = arch.groups
    if arch.delta_net:
        cut["key heads of linear layers"] = arch.delta_net.key_heads
    if not all(arch.moe_layers):
        cut["rows of a feed-forward"] = arch.ffn
    cut |= {"rows of an expert": arch.expert_ffn, "rows of the shared expert": arch.shared_ffn}
    if wrong := [f"{number} {what}" for what, number in cut.items() if number % tensor]:
        found.fault(
            "rollout.tensor_parallel model.path",
            f"{tensor} does not divide the model's {' and '.join(wrong)}. Choose a divisor",
        )


def _check_biased_experts(found: Findings, rollout: RolloutConfig) -> None:
    """The engines can serve experts with biases."""
    if rollout.quantization != "none":
        found.fault(
            "rollout.quantization model.path",
            "the model's experts have biases, which vLLM does not take into experts in float8. Set "
            "rollout.quantization to none",
        )


def _check_linear_layers(found: Findings, config: Config) -> None:
    """The trainer can compute the model's linear layers."""
    if uses_gpus(config) and not is_installed("fla"):
        found.fault(
            "model.path",
            "the trainer computes the model's linear-attention layers with the kernels of flash-linear-attention, and "
            "they are not installed. Install fla-core in the version that the extra gpu of setup.py names",
        )
