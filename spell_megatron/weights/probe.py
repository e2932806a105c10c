"""Whether engines compute what the trainer does: log-probabilities of a few tokens, before a run trains on any."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests

from spell_megatron.config.schema import RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_rank_0
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.engines import Engines
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row

Mismatch = Callable[[Sequence[Row] | None], list[float]]
"""`Trainer.mismatch`."""

LIMITS = {"float32": 0.03, "bfloat16": 0.3}
"""Largest difference of log-probabilities that rounding explains, by the type of the weights.

It is the median over answers of the mean over an answer's tokens: in bfloat16 single answers of a mixture of experts
differ by 1, because tokens go to other experts. Measured on CPUs: right ones 1e-6 and 0.02; a stray attention window
3.5, scaled logits 1, YaRN past its table 1e4."""
QUANTISED_LIMIT = 0.6
"""The same for engines that quantise the weights."""

SHORT, SHORT_TOKENS, SAMPLES, TOKENS, SEED = 4, 24, 4, 8, 0
"""Number of short prompts and their length; answers to each prompt and their length; seed of the prompts' token ids."""


def compare_logprobs(
    engines: Engines | None, mismatch: Mismatch, policy: PolicyModel, rollout: RolloutConfig, longest: int
) -> None:
    """Have every engine answer some short prompts and a long one, and compare.

    The prompts are of random token ids, the same in every run. Nothing is left behind but the prompts in the engines'
    prefix caches. All trainer ranks call it; engines that share GPUs with the trainer sleep afterwards.

    Args:
        engines: with the trainer's weights, on rank 0; None on the others.
        mismatch: of the trainer, which all ranks run.
        policy: the model.
        rollout: the settings of that name.
        longest: tokens of the long prompt, at most those that a prompt of the run can have.

    Raises:
        UserError: the log-probabilities of an engine are not the trainer's, or an engine does not answer.
    """
    answers: list[_Answers] = []
    if engines is not None:
        prompts = _prompts(policy.arch.vocabulary, longest)
        with ThreadPoolExecutor(len(engines.engines)) as threads:
            answers = list(threads.map(lambda engine: _ask(engine, prompts, rollout), engines.engines))
        engines.sleep()
    from_rank_0("the engines have answered")
    rows = [row for answer in answers for row in answer.rows]
    differences = iter(mismatch(rows if engines is not None else None))
    for answer in answers:
        _judge(answer, [next(differences) for _ in answer.rows], str(policy.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Answers:
    """What an engine has sampled."""

    url: str
    quantization: str | None
    """Of its weights."""
    rows: list[Row]
    """With its log-probabilities."""


def _prompts(vocabulary: int, longest: int) -> list[list[int]]:
    """Short prompts, and one that reaches the last positions."""
    rng = np.random.default_rng(SEED)
    lengths = [min(SHORT_TOKENS, longest)] * SHORT + [longest]
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def _ask(engine: Engine, prompts: list[list[int]], rollout: RolloutConfig) -> _Answers:
    """What an engine samples after each prompt."""
    sampling = rollout.sampling
    wanted: dict[str, Any] = {
        "n": min(SAMPLES, rollout.concurrency),  # vLLM refuses more than it may run at a time
        "temperature": sampling.temperature,
        "top_p": 1.0,  # below, the engine's log-probabilities are of the tokens that it leaves
        "max_tokens": min(TOKENS, sampling.max_response_tokens),
        "logprobs": 0,
        "ignore_eos": True,
        "detokenize": False,
    }
    rows = []
    try:
        quantization = engine.call("spell_describe")[0]["quantization"]
        for number, prompt in enumerate(prompts):
            params = wanted | {"seed": number, "routed_experts_prompt_start": len(prompt)}
            body = {"token_ids": prompt, "sampling_params": params}
            for choice in engine.post("/inference/v1/generate", body, timeout=rollout.request_timeout)["choices"]:
                logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
                values = np.array([math.nan if value is None else value for value in logprobs], dtype=np.float32)
                tokens = np.array([*prompt, *choice["token_ids"]], dtype=np.int64)
                rows.append(Row(tokens, len(prompt), np.zeros_like(values), values))
    except requests.RequestException as error:
        raise UserError(
            f"{engine.url} did not answer the prompts by which it is compared with the trainer ({error}). Look into "
            "its log, correct what it names, and start or resume the run."
        ) from error
    return _Answers(engine.url, quantization, rows)


def _judge(answers: _Answers, differences: list[float], dtype: str) -> None:
    """UserError if the mean differences of an engine's rows are more than rounding explains."""
    limit = QUANTISED_LIMIT if answers.quantization else LIMITS[dtype]
    kind = f"an engine that quantises ({answers.quantization})" if answers.quantization else dtype
    lengths = np.array([row.prompt_length for row in answers.rows])
    typical = {length: float(np.median(np.array(differences)[lengths == length])) for length in np.unique(lengths)}
    wrong = [length for length, value in typical.items() if not value <= limit]
    if not wrong:
        return
    found = " and ".join(f"{value:.2g} after prompts of {length:,} tokens" for length, value in typical.items())
    if len(wrong) < len(typical):
        cause = (
            "Likely the two treat positions or distances differently: see the rope scaling and the attention's windows "
            "in config.json"
        )
    else:
        cause = (
            "Likely vLLM reads an option of config.json in another way than the trainer, or the engine has flags that "
            "change the model (rollout.extra_args, or where it was started)"
        )
    raise UserError(
        f"{answers.url} and the trainer have the same weights and do not compute the same: log-probabilities of "
        f"sampled tokens differ by {found}. Up to {limit:g} is normal for {kind}. {cause}. The run stops, "
        "because it would learn from wrong probabilities."
    )
