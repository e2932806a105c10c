"""Models and layouts that are not supported, and values of config.json that cannot be."""

import json

import pytest
import transformers
from families import LLAMA3_ROPE, hf_config
from hf_models import COMMON, MOE, YARN_ROPE

from spell_megatron.cli import main
from spell_megatron.config.schema import TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel

pytestmark = pytest.mark.usefixtures("process_group")

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_key_value_heads",
)
MOE_SIZES = ("num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")


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
    text = hf_config("qwen2", **COMMON)
    transformers.LlavaConfig(text_config=text, vision_config={}).save_pretrained(tmp_path / "vision")
    with pytest.raises(
        UserError, match="'llava' hold a language model within.*NEW lacks the rest, such as a vision tower"
    ):
        PolicyModel.load(tmp_path / "vision")
    both = {"vision": True, "tie_word_embeddings": True}
    assert "vocab_size is 0" in rejected(tmp_path / "j", "qwen3_5_text", {"vision": True, "vocab_size": 0})
    whole = hf_config("qwen3_5_text", **COMMON | both)
    for number, (text, said) in enumerate(
        [
            (None, "text_config is None"),
            ([1], r"text_config is \[1\]; it must describe the language model"),
            (
                whole.text_config.to_dict() | {"model_type": "qwen2"},
                "has model_type 'qwen2'; .* must be 'qwen3_5_text'",
            ),
        ]
    ):
        whole.save_pretrained(tmp_path / f"within{number}")
        path = tmp_path / f"within{number}" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": text}))
        with pytest.raises(UserError, match=said):
            PolicyModel.load(path.parent)
    whole.tie_word_embeddings = False
    whole.save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match="tie_word_embeddings is False, and True in text_config"):
        PolicyModel.load(tmp_path / "tied")
    assert "hidden_act" in rejected(tmp_path / "a", "llama", {"hidden_act": "gelu"})
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert "sliding-window" in rejected(tmp_path / "b", "qwen2", window)
    refusal = rejected(tmp_path / "f", "mistral", {"sliding_window": 4096})
    assert "sliding-window" in refusal and "set sliding_window to null" in refusal
    moe_window = MOE | {"use_sliding_window": True, "sliding_window": 8}
    assert "sliding-window" in rejected(tmp_path / "c", "qwen3_moe", moe_window)
    dynamic = {"rope_parameters": {**YARN_ROPE, "rope_type": "dynamic"}}
    assert "'dynamic'" in rejected(tmp_path / "d", "llama", dynamic)
    partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert "partial_rotary_factor 0.5" in rejected(tmp_path / "g", "qwen3", partial)
    sliding = {"layer_types": ["sliding_attention", "full_attention"]}
    assert "sliding-window" in rejected(tmp_path / "i", "qwen3_5_text", sliding)
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
        ("i", "qwen3_5_text", {"linear_num_key_heads": 1}, {"tensor": 2}, "1 key heads of the model's linear layers"),
        ("j", "qwen3_5_text", {}, {"context": 4}, "4 does not divide the 2 key heads"),
        ("l", "qwen3_5_text", FOUR_KEY_HEADS | {"num_attention_heads": 2}, {"context": 4}, "need whole rows"),
        ("k", "qwen3_5_moe_text", MOE | {"shared_expert_intermediate_size": 33}, {"tensor": 2}, "width 33"),
    ]:
        assert reason in rejected(tmp_path / name, family, fields, parallel=parallel)


FOUR_KEY_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
PARTLY = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = LLAMA3_ROPE | {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "field", "value", "said"),
    [
        *(("llama", field, 0, f"{field} is 0; it must be a whole number of 1 or more") for field in SIZES),
        *(("qwen3", field, -4, f"{field} is -4") for field in SIZES),
        *(("qwen3", field, "4", f"{field} is '4'; it must be a whole number of 1 or more") for field in SIZES),
        *(("qwen2", field, 4.0, f"{field} is 4.0; it must be a whole number of 1 or more") for field in SIZES),
        *(("mistral", field, None, f"{field} is None") for field in SIZES[:5]),
        *(("llama", field, ..., f"{field} is missing") for field in SIZES[:5]),
        ("qwen3", "num_key_value_heads", 3, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ("qwen3", "head_dim", 31, "head_dim.*31"),
        ("qwen3", "head_dim", True, "head_dim is True"),
        ("qwen2", "hidden_size", 50, "hidden_size 50 is no multiple of num_attention_heads 4"),
        ("llama", "rms_norm_eps", float("nan"), "rms_norm_eps is nan; it must be a number above 0"),
        ("llama", "rms_norm_eps", 0.0, "rms_norm_eps is 0.0"),
        ("llama", "dtype", "int8", "dtype is torch.int8"),
        ("llama", "dtype", 3, "dtype is 3"),
        ("qwen3_moe", "num_experts_per_tok", 7, "num_experts_per_tok 7 is more than num_experts 6"),
        *(("qwen3_moe", field, 0, f"{field} is 0") for field in MOE_SIZES),
        ("qwen3_moe", "num_experts_per_tok", ..., "num_experts_per_tok is missing"),
        ("qwen3_moe", "num_experts", "many", "num_.*experts is 'many'"),
        ("qwen3_moe", "mlp_only_layers", [3], "mlp_only_layers names layer 3; the layers have the numbers 0 to 2"),
        (
            "qwen3_5_text",
            "linear_num_key_heads",
            3,
            "linear_num_value_heads 4 is no multiple of linear_num_key_heads 3",
        ),
        ("qwen3_5_text", "linear_conv_kernel_dim", 0, "linear_conv_kernel_dim is 0; it must be a whole number of 1 or"),
        ("qwen3_5_text", "linear_value_head_dim", ..., "linear_value_head_dim is missing"),
        ("qwen3_5_text", "layer_types", ["linear_attention"] * 3, "layer_types has no full_attention"),
        ("qwen3_5_text", "layer_types", ["full_attention"] * 2, "num_hidden_layers"),
        ("gpt_oss", "sliding_window", 0, "sliding_window is 0; it must be a whole number of 1 or more"),
        ("gpt_oss", "sliding_window", ..., "sliding_window is missing"),
        ("gpt_oss", "swiglu_limit", 0.0, "swiglu_limit is 0.0; it must be a number above 0"),
        ("gpt_oss", "swiglu_alpha", 1.5, "swiglu_alpha is 1.5; it must be 1.702"),
        ("qwen3_5_text", "layer_types", ..., "full_attention_interval is 4 and .* from 1 to num_hidden_layers, 3"),
        ("qwen3_5_text", "rope_parameters", PARTLY | {"partial_rotary_factor": 0.1}, "turn 3, which must be an even"),
        ("llama", "rope_parameters", PARTLY | {"partial_rotary_factor": "0.5"}, "partial_rotary_factor is '0.5'"),
        ("qwen3_5_moe_text", "num_experts", 0, "num_experts is 0; it must be a whole number of 1 or more"),
        ("qwen3_5_moe_text", "shared_expert_intermediate_size", -1, "shared_expert_intermediate_size is -1"),
        ("llama", "rope_parameters", {"full_attention": YARN_ROPE}, "not a set for each kind of layer"),
        ("llama", "rope_parameters", YARN_ROPE | {"factor": "4"}, "rope_parameters .* give no rotary embedding"),
        ("llama", "rope_parameters", YARN_ROPE | {"factor": ...}, "factor"),
        ("llama", "rope_parameters", YARN_ROPE | {"rope_theta": -1.0}, "give no rotary embedding"),
        ("llama", "rope_parameters", YARN_ROPE | {"rope_theta": 0.0}, "give no rotary embedding"),
        ("llama", "rope_parameters", YARN_ROPE | {"attention_factor": float("nan")}, "give no rotary embedding"),
        ("llama", "rope_parameters", {"rope_theta": 1e4, "factor": 2.0}, "factor 2.0, but no rope_type that uses it"),
        ("llama", "rope_parameters", LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position.* 0;"),
        ("llama", "rope_parameters", LLAMA3 | {"low_freq_factor": -1.0}, "low_freq_factor -1.0"),
    ],
)
def test_values_that_no_model_can_have_are_named(tmp_path, family, field, value, said):
    folder = write_config(tmp_path, family, field, value)
    with pytest.raises(UserError, match=f"(?s)config.json cannot be (used|read).*{said}"):
        PolicyModel.load(folder)


@pytest.mark.parametrize("interval", [0, -2, 4, "2", None])
def test_an_interval_that_makes_no_attention_is_named(tmp_path, interval):
    folder = write_config(tmp_path, "qwen3_5_text", "layer_types", ...)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"full_attention_interval": interval}))
    with pytest.raises(UserError, match=f"full_attention_interval is {interval!r} and there are no layer_types"):
        PolicyModel.load(folder)


def write_config(folder, family, field, value):
    """A folder with a config.json in which one field has another value; ... is none."""
    hf_config(family, **COMMON | (MOE if "moe" in family else {})).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if field == "num_experts" and "num_local_experts" in config:
        field = "num_local_experts"
    value = {k: v for k, v in value.items() if v is not ...} if isinstance(value, dict) else value
    config = {k: v for k, v in (config | {field: value}).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_all_values_that_cannot_be_are_told_at_once(tmp_path):
    folder = write_config(tmp_path, "qwen3_moe", "hidden_size", 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": -1, "num_experts_per_tok": "2"}))
    with pytest.raises(UserError) as error:
        PolicyModel.load(folder)
    assert all(field in str(error.value) for field in ("hidden_size", "vocab_size", "num_experts_per_tok"))


def test_older_configurations_without_heads_of_keys_are_read(tmp_path):
    arch = PolicyModel.load(write_config(tmp_path, "llama", "num_key_value_heads", ...)).arch
    assert (arch.heads, arch.groups) == (4, 4)


def test_commands_tell_what_is_wrong_with_config_json(tmp_path, capsys):
    folder = write_config(tmp_path / "model", "qwen3_moe", "num_experts_per_tok", 7)
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: {{path: {folder}}}\ndata: {{documents: unused.jsonl}}\n")
    for words in (
        ["plan", "--config", str(settings)],
        ["train", "--config", str(settings), "--dry-run"],
        ["convert", "hf-to-megatron", "--hf", str(folder), "--megatron", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        assert "num_experts_per_tok 7 is more than num_experts 6" in capsys.readouterr().err
