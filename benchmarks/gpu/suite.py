"""What the stages share: their command line and result file, the clock, random models and rows."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from spell_megatron.files import write_text

GROUP = 8
COSINE = 0.9999

Part = Callable[[bool], dict[str, Any]]
"""Computes figures, among them `holds`; True asks for sizes at which it also runs on a CPU."""


def main(parts: dict[str, Part], about: str | None) -> None:
    """The command line of a stage. Its result file is complete after every part, also if a later one never ends."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: proves the script only")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--result", type=Path, required=True, help="file for the figures")
    options = parser.parse_args()
    result: dict[str, Any] = {"device": device_name(), "versions": versions(), "started": options.parts, "figures": {}}
    for name in options.parts:
        start = time.perf_counter()
        figures = figures_of(parts[name], options.tiny)
        figures["part_seconds"] = time.perf_counter() - start
        result["figures"][name] = figures
        write_text(options.result, json.dumps(result, indent=1) + "\n")
        print(f"  {name:14} {shown(figures)}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def figures_of(part: Part, tiny: bool) -> dict[str, Any]:
    """The figures of a part, or why there are none; the other parts are wanted all the more then."""
    try:
        return part(tiny)
    except ModuleNotFoundError as error:
        return {"missing": error.name, "holds": False}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "holds": False}


def shown(figures: dict) -> str:
    """Figures in lines: plain ones in one, each group of them in a line of its own."""
    plain = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    line = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())
    return line + "".join(f"\n{'':14} {k}: {shown(v)}" for k, v in figures.items() if isinstance(v, dict))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny sizes"


def versions() -> dict[str, str | None]:
    """Releases of the packages that matter; None: not installed."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for name in ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def seconds(action: Callable[[], object], repeats: int = 3, warm: bool = True) -> float:
    """Shortest time of an action, after a warm-up if it wants one."""
    times = []
    for _ in range(repeats + warm):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times[int(warm) :])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_peak() -> int:
    """Bytes in use on the GPU; and starts a new record of the peak."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def tree(prompt: int, response: int) -> list:
    """Rows of one prompt with GROUP responses."""
    from spell_megatron.training.prefix_tree import Row

    rng = np.random.default_rng(0)
    start, ones = rng.integers(0, 1000, prompt), np.ones(response, np.float32)
    # Weights of both signs, as advantages are.
    return [
        Row(np.concatenate([start, rng.integers(0, 1000, response)]), prompt, ones * (1.0 - i % 2 * 2.0), -ones)
        for i in range(GROUP)
    ]


def sizes(tiny: bool, **changes: Any):
    """Configuration of a Qwen3-MoE with the sizes of Qwen3-30B-A3B, or tiny ones, but for `changes`."""
    from transformers import Qwen3MoeConfig

    own = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048}
    own |= {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
    if tiny:
        own |= {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
        own |= {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 1024}
    own |= {"intermediate_size": 3 * own["hidden_size"], "norm_topk_prob": True, "tie_word_embeddings": False}
    return Qwen3MoeConfig(**own | {"max_position_embeddings": 262144} | changes)


def run_config(dtype: str, tokens: int, response: int, folder: Path | str = "none"):
    """Settings of a run whose microbatches hold `tokens` tokens."""
    from spell_megatron.config.schema import Config

    return Config(
        model={"path": folder, "dtype": dtype},
        data={"documents": "none"},
        selfplay={"group_size": GROUP},
        rollout={"sampling": {"max_prompt_tokens": tokens, "max_response_tokens": response}},
        training={"tokens_per_microbatch": tokens, "logprob_chunk": 512, "recompute": "full"},
    )


@functools.cache
def initialise() -> None:
    """Make Megatron's process groups of this process alone."""
    from transformers import Qwen3MoeConfig

    from spell_megatron.config.schema import TrainingConfig
    from spell_megatron.training import backend
    from spell_megatron.training.policy import PolicyModel

    backend.initialise(PolicyModel.of(Qwen3MoeConfig()), TrainingConfig())


def random_model(architecture, training, dtype: str = "bfloat16", plain: bool = False):
    """A Megatron model with random weights, made where it is computed, without a checkpoint.

    plain: without transformer-engine, also where it is installed.
    """
    from spell_megatron.training.model import build_model
    from spell_megatron.training.policy import PolicyModel

    initialise()
    model = build_model(PolicyModel.of(architecture, dtype), training, plain=plain)
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def gpu_flops() -> float | None:
    """Dense bfloat16 operations per second of this GPU, as the planner knows it; None: it does not know this GPU."""
    if not torch.cuda.is_available():
        return None
    from spell_megatron.planner.gpus import GPUS

    found = torch.cuda.get_device_name()
    return next((gpu.flops for name, gpu in GPUS.items() if name.split("-")[0] in found), None)
