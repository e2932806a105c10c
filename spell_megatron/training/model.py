"""From a Hugging Face configuration to this rank's part of a Megatron-Core model."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from spell_megatron.config.faults import raise_faults
from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.layers import layer_spec
from spell_megatron.training.layout import context_levels, layout_faults
from spell_megatron.training.moe import routers
from spell_megatron.training.policy import Architecture, PolicyModel
from spell_megatron.training.stages import stage_layers

EXTRA_STATE = "._extra_state"


class TreeGPTModel(GPTModel):
    """A Megatron GPT model over rows of prefix trees, without the vocabulary head in its forward pass.

    `output_layer` and `output_weight` make logits of chosen hidden states:
    `model.output_layer(hidden, weight=model.output_weight)[0]`. With a vocabulary that the tensor-parallel
    size does not divide, the last columns (from `policy.arch.vocabulary` on) are padding and belong in no softmax.
    """

    def __init__(self, config: TransformerConfig, policy: PolicyModel, offload: bool = False, **kwargs: Any) -> None:
        """offload: keep what the decoder saves for the backward pass in host memory (`training.offload`)."""
        super().__init__(config=config, position_embedding_type="none", **kwargs)
        self.policy = policy
        # Neither a parameter nor a buffer: it must stay float32 and out of checkpoints.
        self._frequencies = policy.rotary[0].to(torch.cuda.current_device())
        self._routers = routers(self)
        self._offload = offload
        self.register_load_state_dict_post_hook(_want_no_extra_state)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        end: Tensor,
        uncounted: Tensor | None = None,
        routing: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm (last pipeline stage), or this stage's output.

        Args:
            tokens: [1, t] token ids; with context parallelism this rank's slice of the row.
            position_ids: [1, t] depth of each token in its tree.
            end: [whole row] end of each token's subtree (see `attention`); it must not be changed in place.
            uncounted: [1, t] bool, True for tokens that the experts' load and auxiliary loss leave out.
            routing: [t, layers of this stage, top_k] experts to replay (see `moe.Router.recorded`).

        Returns:
            [t, 1, hidden]; with sequence parallelism this rank's part of the tokens.
        """
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        angles = position_ids[0].float()[:, None] * self._frequencies
        rotary = torch.cat([angles, angles], dim=-1)[:, None, None, :]
        if self.config.sequence_parallel:
            shards, rank = self.config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
            uncounted = None if uncounted is None else uncounted.chunk(shards, dim=1)[rank]
            routing = None if routing is None else routing.chunk(shards)[rank]
        for router in self._routers:
            router.recorded = None if routing is None else routing[:, router.layer_number - self.layers.start - 1]
        with saved_tensors_hooks(_to_host, _to_device) if self._offload else nullcontext():
            return self.decoder(hidden_states=hidden, attention_mask=end, rotary_pos_emb=rotary, padding_mask=uncounted)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Megatron's, but the same entries and keys for plain and transformer-engine layers.

        Megatron adds an `_extra_state` for some plain layers and for other ones of transformer-engine. It holds the
        scales of FP8, which this model does not use.
        """
        entries = super().sharded_state_dict(*args, **kwargs)
        return {name: entry for name, entry in entries.items() if EXTRA_STATE not in name}

    @property
    def layers(self) -> range:
        """Numbers, from 0, of the layers of this pipeline stage."""
        first = self.decoder.layers[0].layer_number - 1
        return range(first, first + len(self.decoder.layers))

    @property
    def output_weight(self) -> Tensor | None:
        """The weight to give to `output_layer`: the shared embedding, or None where the layer has its own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None


def _want_no_extra_state(model: TreeGPTModel, incompatible: Any) -> None:
    """Let a state dict load that has no `_extra_state` (see `sharded_state_dict`)."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if EXTRA_STATE not in name]


# torch's own save_on_cpu would copy parameters too, and the positions that all layers share once per layer.
def _to_host(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    """A copy in host memory of an activation that autograd saves; other tensors as they are."""
    if not saved.requires_grad or isinstance(saved, torch.nn.Parameter):
        return saved
    host = torch.empty(saved.shape, dtype=saved.dtype, device="cpu", pin_memory=saved.is_cuda)
    # The copies need no waiting: they are in the same stream as what computes the tensor and what uses it.
    return saved.device, host.copy_(saved, non_blocking=True)


def _to_device(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    """What `_to_host` was given."""
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)


def build_model(policy: PolicyModel, training: TrainingConfig, plain: bool = False) -> TreeGPTModel:
    """Build this rank's part of the model, on its device, with uninitialised weights.

    `backend.initialise` must have been called. Weights come from `weights.huggingface.load_weights` or a
    checkpoint. `plain`: of Megatron's own layers, also where transformer-engine is installed.

    Raises:
        UserError: the model or the layout is not supported, or they do not fit each other.
    """
    arch, parallel = policy.arch, training.parallel
    raise_faults(layout_faults(arch, parallel), "the layout of the trainer")
    use_te = not plain and _has_transformer_engine()
    transformer_config = _transformer_config(policy, training, use_te)
    model = TreeGPTModel(
        config=transformer_config,
        policy=policy,
        offload=training.offload,
        transformer_layer_spec=layer_spec(transformer_config, policy, use_te),
        vocab_size=arch.vocabulary + -arch.vocabulary % parallel.tensor,
        max_sequence_length=policy.hf_config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tied,
    )
    for layer in model.modules():  # Megatron makes the gates of shared experts in host memory
        if isinstance(layer, SharedExpertMLP):
            gate = torch.nn.Parameter(layer.gate_weight.detach().to(torch.cuda.current_device()))
            gate.sequence_parallel = transformer_config.sequence_parallel
            layer.gate_weight = gate
    # Without expert parallelism megatron-core 0.16 takes experts for dense layers, also where their tensor parallelism
    # is another one, and sums gradients of different shards. The mark sends them to the experts' process groups; 0.19
    # sets it itself.
    for layer in model.modules():
        for name, parameter in layer.experts.named_parameters() if isinstance(layer, MoELayer) else ():
            if parallel.expert_tensor != parallel.tensor:
                parameter.allreduce = False
            if "bias" in name:
                _place_bias_of_experts(parameter, whole="linear_fc2" in name)
    return model


def _place_bias_of_experts(bias: torch.nn.Parameter, whole: bool) -> None:
    """Say which ranks hold a bias of experts: Megatron takes it for one of a dense layer.

    whole: the ranks that share an expert have it whole, and the norm of all gradients counts that of the first.
    """
    bias.sequence_parallel = False  # the tensor-parallel ranks may have other experts
    bias.tensor_model_parallel = True
    bias.shared = whole and parallel_state.get_expert_tensor_parallel_rank() > 0


def _has_transformer_engine() -> bool:
    # The probe looks for the package only: importing it without a GPU fails.
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def _transformer_config(policy: PolicyModel, training: TrainingConfig, use_te: bool) -> TransformerConfig:
    arch, dtype, parallel = policy.arch, policy.dtype, training.parallel
    # cos and sin are both scaled by `factor`, hence every score by its square if all dimensions are turned.
    factor = policy.rotary[1] if arch.rotary_dim == arch.head_dim else 1.0
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.groups,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn or arch.expert_ffn,
        normalization="RMSNorm",
        layernorm_epsilon=policy.hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=quick_gelu if arch.glu_limit else F.silu,
        activation_func_clamp_value=arch.glu_limit,
        glu_linear_offset=1.0 if arch.glu_limit else 0.0,
        add_bias_linear=False,  # biases are given per layer by the spec
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        layernorm_zero_centered_gamma=arch.centred_norms,
        attention_output_gate=arch.output_gate,
        linear_attention_freq=[int(linear) for linear in arch.delta_layers] if arch.delta_net else None,
        softmax_type="learnable" if arch.sinks else "vanilla",
        window_size=(arch.window - 1, 0) if arch.window else None,
        window_attn_skip_freq=[int(windowed) for windowed in arch.window_layers] if arch.window else None,
        softmax_scale=factor**2 / arch.head_dim**0.5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=_uneven_stages(arch, training),
        context_parallel_size=parallel.context,
        hierarchical_context_parallel_sizes=context_levels(arch, parallel),
        sequence_parallel=parallel.tensor > 1,  # Megatron's mixture of experts needs it with tensor parallelism
        variable_seq_lengths=parallel.pipeline > 1,  # rows differ in length
        deallocate_pipeline_outputs=True,
        # Megatron checks it for dense models too: all-gather is refused with variable_seq_lengths.
        moe_token_dispatcher_type=training.moe_dispatcher if arch.experts else "alltoall",
        calculate_per_token_loss=True,  # the loss function divides by the whole batch's tokens
        apply_rope_fusion=use_te,
        bias_activation_fusion=use_te and not arch.mlp_bias,
        bias_dropout_fusion=use_te,
        **_expert_options(arch, training, use_te),
        **_recompute_options(arch, training),
    )


def _expert_options(arch: Architecture, training: TrainingConfig, use_te: bool) -> dict[str, Any]:
    if not arch.experts:
        return {}
    return {
        "num_moe_experts": arch.experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.expert_ffn,
        "moe_shared_expert_intermediate_size": arch.shared_ffn or None,
        "moe_shared_expert_gate": arch.shared_ffn > 0,
        "moe_layer_freq": [int(is_moe) for is_moe in arch.moe_layers],
        # Softmax over all experts, renormalised over the chosen ones, is softmax over the chosen ones.
        "moe_router_pre_softmax": not arch.normalise_router,
        "moe_router_dtype": "fp32",
        "moe_enable_routing_replay": training.routing_replay,
        "moe_router_load_balancing_type": "aux_loss" if training.moe_aux_loss else "none",
        "moe_aux_loss_coeff": training.moe_aux_loss,
        "moe_grouped_gemm": use_te,
        "moe_permute_fusion": use_te,
        "expert_model_parallel_size": training.parallel.expert,
        "expert_tensor_parallel_size": training.parallel.expert_tensor,
    }


def _recompute_options(arch: Architecture, training: TrainingConfig) -> dict[str, Any]:
    if training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if training.recompute == "selective":
        # Attention saves no scores, so that the feed-forward is what is worth computing again.
        kinds = {"moe" if is_moe else "mlp" for is_moe in arch.moe_layers}
        return {"recompute_granularity": "selective", "recompute_modules": sorted(kinds)}
    return {}


def _uneven_stages(arch: Architecture, training: TrainingConfig) -> list[list[str]] | None:
    """Megatron's description of a pipeline whose stages have different numbers of layers; the last has the head.

    None if every stage has the same number of layers."""
    stages = stage_layers(arch, training.parallel.pipeline, training.tokens_per_microbatch)
    if len({len(layers) for layers in stages}) == 1:
        return None
    layout = [["decoder"] * len(layers) for layers in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
