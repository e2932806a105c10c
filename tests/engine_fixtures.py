"""Tiny random policies with a byte tokenizer, and the engines that serve them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = 260
"""256 bytes and the four special tokens <s>, </s>, <|im_start|> and <|im_end|>."""


def save_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


# kind: (family, fields of config.json); the name of a family is a kind too
KINDS = {"dense": ("qwen3", {}), "tied": ("qwen3", {"tie_word_embeddings": True}), "moe": ("qwen3_moe", {})}
KINDS["wide_experts"] = ("gpt_oss", {"intermediate_size": 128})
KINDS |= {"vision": ("qwen3_5_text", {"vision": True}), "vision_moe": ("qwen3_5_moe_text", {"vision": True})}


def save_policy(kind: str, folder: Path, seed: int) -> None:
    """Writes a random float32 checkpoint of one of `KINDS` or of a family."""
    from families import hf_model

    family, fields = KINDS.get(kind, (kind, {}))
    model = hf_model(
        family,
        seed,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        initializer_range=0.2,
        **{"intermediate_size": 96} | fields | engine_sizes(family),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # engines in bfloat16 keep it in float32, and pushes round it
            parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


def engine_sizes(family: str) -> dict:
    """Small sizes that vLLM serves on CPUs: its heads there have a multiple of 32 dimensions, linear ones of 64."""
    from families import FAMILIES

    return {
        "hidden_size": 64 if "head_dim" in FAMILIES[family][1] else 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    } | ({"linear_key_head_dim": 64, "linear_value_head_dim": 64} if "layer_types" in FAMILIES[family][1] else {})


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """policy(kind, seed=0): folder of a tiny random checkpoint; policy("quickstart"): that of the quick start."""
    made: dict[tuple[str, int], Path] = {}

    def get(kind: str, seed: int = 0) -> Path:
        if kind == "quickstart":
            return Path(__file__).parents[1] / "examples" / "quickstart" / "policy"
        if (kind, seed) not in made:
            made[kind, seed] = tmp_path_factory.mktemp(f"{kind}{seed}-")
            save_policy(kind, made[kind, seed], seed)
        return made[kind, seed]

    return get


def engine_config(model: Path, dtype: str = "float32", **rollout: object):
    """Configuration of small CPU engines for a checkpoint; `rollout` overrides its settings."""
    from spell_megatron.config.schema import Config

    settings = {
        "concurrency": 32,
        "cpu_kv_cache_gib": 0.25,
        "start_timeout": 600,
        "sampling": {
            "temperature": 0.8,
            "top_p": 1.0,
            "max_prompt_tokens": 768,
            "max_response_tokens": 256,
        },
    }
    return Config(
        model={"path": model, "dtype": dtype},
        data={"documents": "unused.parquet"},
        run={"device": "cpu"},
        rollout=settings | rollout,
    )


def open_engines(config, folder: Path, rendezvous=None):
    """The engines of a configuration, on a machine with one trainer process; their logs go to `folder`."""
    from spell_megatron.rollout.engines import Engines

    return Engines.open(
        config.model,
        config.rollout,
        folder,
        device=config.run.device,
        seed=config.run.seed,
        routing=config.training.routing_replay,
        trainers=1,
        rendezvous=rendezvous,
    )


@pytest.fixture(scope="session")
def engines_for(policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """engines_for(kind, **settings): running engines of policy(kind); one set runs at a time."""
    current: dict = {}

    def get(kind: str, **settings: object):
        name = f"{kind} {settings}"
        if name not in current or not current[name].engines[0].healthy():
            close()
            current[name] = open_engines(engine_config(policy(kind), **settings), tmp_path_factory.mktemp("engines"))
        return current[name]

    def close() -> None:
        for engines in current.values():
            engines.stop()
        current.clear()

    yield get
    close()
