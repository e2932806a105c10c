"""Models and layouts that are not supported."""

import pytest
from families import hf_config
from hf_models import COMMON, MOE, YARN_ROPE

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel

pytestmark = pytest.mark.usefixtures("process_group")


def rejected(folder, family, fields, **training) -> str:
    hf_config(family, **COMMON | fields).save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        build_model(PolicyModel.load(folder), TrainingConfig(**training))
    return str(caught.value)


def test_unsupported_models_are_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2.*Qwen3 mixture of experts"):
        PolicyModel.load(tmp_path / "gpt2")
    with pytest.raises(UserError, match="no config.json"):
        PolicyModel.load(tmp_path / "absent")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        PolicyModel.load(tmp_path / "bad")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "from-next-year"}')
    with pytest.raises(UserError, match="Supported are Llama"):
        PolicyModel.load(tmp_path / "new")
    assert "hidden_act" in rejected(tmp_path / "a", "llama", {"hidden_act": "gelu"})
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert "sliding-window" in rejected(tmp_path / "b", "qwen2", window)
    refusal = rejected(tmp_path / "f", "mistral", {"sliding_window": 4096})
    assert "sliding-window" in refusal and "set sliding_window to null" in refusal
    moe_window = MOE | {"use_sliding_window": True, "sliding_window": 8}
    assert "sliding-window" in rejected(tmp_path / "c", "qwen3_moe", moe_window)
    dynamic = {"rope_parameters": {**YARN_ROPE, "rope_type": "dynamic"}}
    assert "'dynamic'" in rejected(tmp_path / "d", "llama", dynamic)
    one = MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}
    assert "norm_topk_prob" in rejected(tmp_path / "e", "qwen3_moe", one)


def test_unsupported_layouts_are_refused(tmp_path):
    for name, family, fields, parallel, reason in [
        ("b", "qwen3", {}, {"tensor": 3}, "heads"),
        ("h", "qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1}, {"tensor": 3}, "projection"),
        ("c", "qwen3", {}, {"pipeline": 9}, "layers"),
        ("d", "qwen3", {}, {"expert": 2}, "no experts"),
        ("e", "qwen3_moe", MOE, {"expert": 4}, "experts"),
        ("f", "qwen3", {"intermediate_size": 81}, {"tensor": 2}, "width 81"),
        ("g", "qwen3_moe", MOE | {"moe_intermediate_size": 33}, {"expert_tensor": 2}, "width 33"),
    ]:
        assert reason in rejected(tmp_path / name, family, fields, parallel=parallel)
