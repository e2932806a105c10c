"""Seconds and peak memory of `spell convert`, compared with `cp` of the same files.

    python benchmarks/convert.py [--gigabytes 2.2] [--tp 2 --pp 2 --ep 2]

Makes a random Qwen3 mixture of experts in bfloat16 (128 experts a layer, as many layers as the size needs), copies it
with `cp`, converts it to a Megatron distributed checkpoint cut for the layout, and converts it back. Each runs as its
own process. The seconds include starting Python and importing torch and Megatron, and end when the data is on the disk
(`sync`). Memory is the largest resident set, including pages of files that were read. "limit" is twice the largest
tensor plus 1 GB. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.huggingface import save_checkpoint
from spell_megatron.weights.names import hf_shapes


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a random checkpoint of about this size; returns the bytes of its largest tensor."""
    sizes = dict(
        vocab_size=151_936,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=3072,
        moe_intermediate_size=384,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    per_layer = 2 * (128 * 3 * 1024 * 384 + 1024 * 128 * (2 * 16 + 2 * 4))
    heads = 2 * 2 * 151_936 * 1024
    layers = max(2, round((gigabytes * 1e9 - heads) / per_layer))
    folder.mkdir()
    Qwen3MoeConfig(**sizes, num_hidden_layers=layers).save_pretrained(folder)
    shapes = hf_shapes(PolicyModel.load(folder))
    torch.manual_seed(0)
    noise = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values()), dtype=torch.bfloat16)
    stream = ((name, noise[: torch.Size(shape).numel()].view(shape)) for name, shape in shapes.items())
    save_checkpoint(stream, folder, folder.with_name("made"))
    shutil.rmtree(folder)
    folder.with_name("made").rename(folder)
    return 2 * len(noise)


def run(*command: object) -> tuple[float, float]:
    """(seconds, peak resident GB) of a process that must succeed, and of `sync` after it."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(errors.decode())
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2)
    for flag in ("tp", "pp", "ep"):
        parser.add_argument(f"--{flag}", type=int, default=2)
    options = parser.parse_args()
    layout = [word for flag in ("tp", "pp", "ep") for word in (f"--{flag}", getattr(options, flag))]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        largest = make_checkpoint(root / "hf", options.gigabytes)
        size = sum(file.stat().st_size for file in (root / "hf").iterdir()) / 1e9
        spell = (sys.executable, "-m", "spell_megatron", "convert")
        figures = {}
        for name, command in (
            ("cp", ("cp", "-r", root / "hf", root / "copy")),
            ("hf-to-megatron", (*spell, "hf-to-megatron", "--hf", root / "hf", "--megatron", root / "m", *layout)),
            ("megatron-to-hf", (*spell, "megatron-to-hf", "--megatron", root / "m", "--hf", root / "back")),
        ):
            seconds, memory = run(*command)
            figures[name] = {"seconds": round(seconds, 2), "peak_gb": round(memory, 3)}
        limit = 2 * largest / 1e9 + 1
        print(f"{size:.2f} GB, largest tensor {largest / 1e9:.2f} GB, layout {' '.join(map(str, layout))}")
        for name, figure in figures.items():
            ratio = figure["seconds"] / figures["cp"]["seconds"]
            print(
                f"  {name:15} {figure['seconds']:7.2f} s  {ratio:5.2f} x cp  peak {figure['peak_gb']:.2f} GB"
                + (f" (limit {limit:.2f})" if name != "cp" else "")
            )
        worst = max(figure["peak_gb"] for name, figure in figures.items() if name != "cp")
        result = {"benchmark": "convert", "gigabytes": round(size, 3), "figures": figures, "limit_gb": round(limit, 3)}
        print(json.dumps(result | {"holds": worst <= limit}))


if __name__ == "__main__":
    main()
