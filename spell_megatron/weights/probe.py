"""Whether engines compute what the trainer does: log-probabilities of a few tokens, before a run trains on any."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests

from spell_megatron.config.schema import RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.engines import Engines
from spell_megatron.training.prefix_tree import Row

LIMITS = {"float32": 0.03, "bfloat16": 0.3}
"""Largest difference of log-probabilities that rounding explains, by the type of the weights.

It is the median over answers of the mean over an answer's tokens: in bfloat16 single answers of a mixture of experts
differ by 1, because tokens go to other experts. Measured on CPUs: right ones 1e-6 and 0.02; a stray attention window
3.5, scaled logits 1, YaRN past its table 1e4."""
QUANTISED_LIMIT = 0.6
"""The same for engines that quantise the weights. Measured on CPUs: 0.2 in float8, with random weights."""

SHORT, SHORT_TOKENS, SAMPLES, TOKENS, SEED = 4, 24, 4, 8, 0
"""Number of short prompts and their length; answers to each prompt and their length; seed of the prompts' token ids."""


@dataclass(frozen=True)
class Answers:
    """What an engine has sampled."""

    url: str
    quantization: str | None
    """Of its weights."""
    rows: list[Row]
    """With its log-probabilities."""


def ask(engines: Engines, vocabulary: int, rollout: RolloutConfig, longest: int) -> list[Answers]:
    """What each engine answers to some short prompts and a long one.

    The prompts are of random token ids, the same in every run. Nothing is left behind but the prompts in the engines'
    prefix caches.

    Args:
        engines: with the trainer's weights.
        vocabulary: number of token ids.
        rollout: the settings of that name.
        longest: tokens of the long prompt, at most those that a prompt of the run can have.

    Raises:
        UserError: an engine does not answer.
    """
    prompts = _prompts(vocabulary, longest)
    with ThreadPoolExecutor(len(engines.engines)) as threads:
        return list(threads.map(lambda engine: _ask(engine, prompts, rollout), engines.engines))


def _prompts(vocabulary: int, longest: int) -> list[list[int]]:
    """Short prompts, and one that reaches the last positions."""
    rng = np.random.default_rng(SEED)
    lengths = [min(SHORT_TOKENS, longest)] * SHORT + [longest]
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def _ask(engine: Engine, prompts: list[list[int]], rollout: RolloutConfig) -> Answers:
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
    return Answers(engine.url, quantization, rows)


def judge(answers: Answers, differences: list[float], dtype: str) -> None:
    """UserError if the trainer differs from an engine by more than rounding explains.

    Args:
        answers: of the engine.
        differences: of each row, by `Trainer.mismatch`.
        dtype: of the weights.
    """
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
