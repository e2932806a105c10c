"""Fixtures of the planner's tests."""

import pytest
from families import hf_config

from benchmarks.planner_memory import make_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    for kind in ("dense", "moe"):
        make_checkpoint(kind, folder / kind)
    sizes = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8, "vocab_size": 4096}
    kinds = ["full_attention"] + ["linear_attention"] * 4
    hybrid = hf_config("qwen3_5_text", layer_types=kinds, intermediate_size=128, dtype="bfloat16", **sizes)
    hybrid.save_pretrained(folder / "hybrid")  # the configuration alone
    return folder
