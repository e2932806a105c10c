"""The families of models that tests run over: a line for each entry of `spell_megatron.training.families`.

Conversion and parity (`hf_models`), the trainer (`trainer_cases`), engines (`engine_fixtures`) and whole steps
(`test_families`) take their models from here, each in sizes of its own.
"""

import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
}

# model_type: (name of transformers' classes, fields of config.json that released models have too)
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 32} | MOE),
    "qwen3_5_text": ("Qwen3_5", {"head_dim": 32} | LINEAR),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {"head_dim": 32, "shared_expert_intermediate_size": 56} | LINEAR | MOE),
    "gpt_oss": ("GptOss", {"head_dim": 32, "sliding_window": 8, "num_experts": 8, "num_experts_per_tok": 2}),
}


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
VISION |= {"num_position_embeddings": 16}


def hf_config(family: str, vision: bool = False, **fields) -> transformers.PretrainedConfig:
    """A configuration of the family; `fields` go before those of the list.

    vision: of a model that holds one of the family beside a vision tower.
    """
    name, options = FAMILIES[family]
    text = "Text" if "layer_types" in options else ""
    config = getattr(transformers, f"{name}{text}Config")(**_alternating(options | fields))
    if not vision:
        return config
    tower = VISION | {"out_hidden_size": config.hidden_size}
    whole = getattr(transformers, f"{name}Config")
    return whole(text_config=config, vision_config=tower, tie_word_embeddings=config.tie_word_embeddings)


def _alternating(fields: dict) -> dict:
    """The fields with `layer_types` repeated to the number of layers. Without that number the defaults go together."""
    types, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if types and layers:
        return fields | {"layer_types": [types[i % len(types)] for i in range(layers)]}
    return {name: value for name, value in fields.items() if name != "layer_types"}


def hf_model(family: str, seed: int = 0, **fields) -> transformers.PreTrainedModel:
    """A random float32 model of the family."""
    torch.manual_seed(seed)
    config = hf_config(family, **fields)
    kind = "ForConditionalGeneration" if fields.get("vision") else "ForCausalLM"
    model = getattr(transformers, FAMILIES[family][0] + kind)(config).float()
    for name, parameter in model.named_parameters():
        # States of random models last for a token or two, and what is left of them is rounding.
        if name.endswith("A_log"):
            parameter.data -= 3
    return model
