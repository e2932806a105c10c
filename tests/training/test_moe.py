"""Experts as grouped products against Megatron's experts one after the other."""

import pytest
import torch
from hf_models import MOE, load, make
from megatron.core.transformer.moe.experts import SequentialMLP

from spell_megatron.training import layers
from spell_megatron.training.moe import GroupedExperts

pytestmark = pytest.mark.usefixtures("process_group")


def logits(built, tokens):
    total = len(tokens)
    hidden = built(tokens[None], torch.arange(total)[None], torch.full((total,), total))
    return built.output_layer(hidden, weight=built.output_weight)[0][:, 0]


def gradients(built, tokens):
    logits(built, tokens).float().square().mean().backward()
    return {name: parameter.grad.float() for name, parameter in built.named_parameters()}


@pytest.fixture
def grouped(monkeypatch):
    """grouped(folder, dtype) -> a model as it is built on a GPU without transformer-engine."""

    def build(*args):
        with monkeypatch.context() as patch:
            patch.setattr(layers, "_wants_grouped_experts", lambda use_te: True)
            built = load(*args)
        assert {type(layer.mlp.experts) for layer in built.decoder.layers} == {GroupedExperts}
        return built

    return build


@pytest.mark.parametrize("case", ["qwen3-moe-not-normalised", "gpt_oss"])
@pytest.mark.parametrize("tokens", [60, 1], ids=["many", "experts-without-a-token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_grouped_experts_equal_sequential_ones(case, dtype, tolerance, tokens, hf_checkpoint, grouped, monkeypatch):
    _, folder = hf_checkpoint(case)
    one, other = load(folder, dtype), grouped(folder, dtype)
    ids = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(1))
    expected = gradients(one, ids)
    monkeypatch.setattr(SequentialMLP, "forward", None)  # nothing may fall back to it
    found = gradients(other, ids)
    assert list(found) == list(expected)
    scale = max(gradient.norm() for gradient in expected.values())
    worst = max((found[name] - expected[name]).norm() / scale for name in expected)
    print(f"{dtype}, {tokens} tokens: gradients differ by at most {worst:.1e}")
    assert worst <= tolerance


def test_no_token_at_all(hf_checkpoint, grouped):
    """An expert-parallel rank may get none; its parameters have gradients of zero all the same."""
    _, folder = hf_checkpoint("qwen3-moe-normalised")
    experts = grouped(folder).decoder.layers[0].mlp.experts
    hidden = torch.zeros(0, experts.config.hidden_size, requires_grad=True)
    output, _ = experts(hidden, torch.zeros(6, dtype=torch.long), torch.zeros(0))
    assert output.shape == hidden.shape
    output.sum().backward()
    assert all(not parameter.grad.any() for parameter in experts.parameters())


def test_sizes_that_the_kernels_do_not_take(tmp_path, grouped):
    """Rows of 41 numbers do not begin at multiples of 16 bytes: these experts run one after the other."""
    make("qwen3_moe", MOE | {"moe_intermediate_size": 41}).save_pretrained(tmp_path)
    tokens = torch.arange(60)
    with torch.no_grad():
        assert torch.equal(logits(grouped(tmp_path), tokens), logits(load(tmp_path), tokens))
