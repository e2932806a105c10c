"""Models cut over two processes: loading, logits and export."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import CASES, make
from torchrun import torchrun

LAYOUTS = [
    ("qwen3", {"tensor": 2}),
    ("qwen2-tied-yarn", {"tensor": 2}),
    ("llama-all-biases", {"tensor": 2}),
    ("qwen2-tied-yarn", {"pipeline": 2}),
    ("qwen3-moe-some-dense-layers", {"pipeline": 2}),
    ("qwen3-moe-some-dense-layers", {"expert": 2}),
    ("qwen3-moe-some-dense-layers", {"expert": 2, "tensor": 2}),
    ("qwen3-moe-normalised", {"tensor": 2, "expert_tensor": 2}),
]


@pytest.mark.slow
def test_two_processes_equal_transformers(tmp_path):
    """Logits of a tree within 1e-4 of transformers'; rank 0 exports every tensor, bit by bit.

    131 vocabulary entries need padding for two ranks, and a tied head lives on both pipeline stages.
    """
    depth = torch.cat([torch.arange(30), torch.arange(20, 38)])
    end = torch.tensor([48] * 20 + [30] * 10 + [48] * 18)
    tokens = torch.randint(0, 131, (48,), generator=torch.Generator().manual_seed(0))
    paths = [torch.arange(30), torch.cat([torch.arange(20), torch.arange(30, 48)])]
    for name in {name for name, _ in LAYOUTS}:
        family, fields = CASES[name]
        hf = make(family, {**fields, "num_hidden_layers": 4, "num_key_value_heads": 2})
        hf.save_pretrained(tmp_path / name)
        logits = torch.empty(48, 131)
        with torch.no_grad():
            for path in paths:
                logits[path] = hf(tokens[path][None]).logits[0]
        tree = {"tokens": tokens, "position_ids": depth, "end": end, "logits": logits}
        torch.save(tree, tmp_path / name / "tree.pt")
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([[str(tmp_path / name), parallel] for name, parallel in LAYOUTS]))
    output = torchrun(2, Path(__file__).with_name("layouts_worker.py"), cases, timeout=600)
    decoder = json.JSONDecoder()
    results = [decoder.raw_decode(part)[0] for part in output.split("RESULT ")[1:]]
    assert len(results) == 2 * len(LAYOUTS)
    for parallel, error, wrong in results:
        print(parallel, "largest logit difference", error)
        assert error is None or error <= 1e-4
        assert not wrong
