"""Configs of tiny models that have all parts of the real ones: windows, experts, shared layers, recurrent states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.engine.model.text_part import MEDIA_TOKENS

LAYERS = 4
VOCABULARY = 499
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

# By the names that configs have for them; a config gets those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    # Wide weights keep the tokens of a random model apart: near-ties would turn on rounding.
    "initializer_range": 0.2,
    # windows
    "sliding_window": 64, "sliding_window_size": 64, "attention_chunk_size": 64, "attention_window_size": 64,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2,
    "top_k_experts": 2, "shared_intermediate_size": 32, "intermediate_size_mlp": 96, "dense_intermediate_size": 96,
    "zero_expert_num": 2, "expert_ffn_hidden_size": 32, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 32, "index_topk": 32, "index_n_heads": 4, "index_head_dim": 16, "index_block_size": 16,
    "index_topk_blocks": 4, "o_lora_rank": 16, "o_groups": 2,
    # recurrent layers
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128,
    "mamba_d_state": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_dt_rank": 8, "ssm_state_size": 16,
    "state_size": 16, "chunk_size": 32, "mamba_chunk_size": 32, "num_heads": 8, "n_groups": 1, "mamba_n_groups": 1,
    "mamba_ngroups": 1, "time_step_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "lru_width": 64,
    "block_size": 32, "hc_mult": 2, "hc_count": 2, "hc_lowrank": 16,
    # embeddings by layer
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    "num_kv_shared_layers": 0, "ple_embed_dim": 64, "dim_model_base": 32, "ngram_vocab_size_base": 64,
    # older names
    "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 4096, "n_inner": 96, "n_ctx": 4096,
    "num_layers": LAYERS, "d_model": 64, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 4096,
    "max_sequence_length": 4096, "rotary_dim": 8, "decoder_layers": LAYERS, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "ffn_dim": 96,
    "ffn_hidden_size": 96, "d_ff": 96, "d_inner": 96, "attention_heads": 4, "attention_hidden_size": 64, "dim": 64,
    "hidden_dim": 96, "num_codebooks": 1, "emb_dim": 64, "embedding_size": 64, "kv_channels": 16,
    "max_position": 4096, "d_rel": 8, "rel_extent": 64, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 16, "model_max_length": 4096,
}  # fmt: skip
# Without these, a config has no such layers at all.
ABSENT_STAYS = ("sliding_window", "q_lora_rank", "num_local_experts", "num_experts")
# The order of layers as released models have it, and what else their structure hangs on.
STRUCTURE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 64, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "phi3": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "gemma3n_text": {
        "num_hidden_layers": 6, "intermediate_size": [96] * 6, "num_kv_shared_layers": 2,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "enable_moe_block": True, "num_experts": 4,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        "per_layer_config": {"2": {"head_dim": 512}, "5": {"head_dim": 512}},
    },
    "qwen3_moe": {"decoder_sparse_step": 1},
    "gpt_oss": {"layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "llama4_text": {"floor_scale": 128},
    "olmo3": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "cohere2": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "exaone4": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL], "sliding_window": 64},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2],
        },
    },
    "glm_ocr_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "deepseek_v2": {"q_lora_rank": None},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "nemotron_h": {"layers_block_type": [LINEAR, "moe", FULL, "mlp"]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", FULL, "conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv", FULL]},
    "lfm3": {"layer_types": ["conv", SLIDING, "conv", FULL]},
    "mimo_v2_flash": {"layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "minimax": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
}  # fmt: skip
MEDIA = {name: VOCABULARY - 2 - number for number, name in enumerate(MEDIA_TOKENS)}
# Encoders beside a text model; nothing of them is computed.
ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_layers": 1,
    "num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "out_hidden_size": 64,
    "embed_dim": 32, "mlp_dim": 32, "conf_num_hidden_layers": 1, "vocab_size": 128,
}  # fmt: skip


def tiny_config(model_type: str, text_type: str = "") -> Any:
    """The transformers config of a tiny model of a type. text_type: of the text model inside, if not its usual one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    parts = getattr(config_class, "sub_configs", None) or {}
    if "text_config" not in parts:
        return _sized(config_class, SIZES, STRUCTURE.get(model_type, {}))
    text_class = CONFIG_MAPPING[text_type] if text_type else type(config_class().get_text_config())
    own = STRUCTURE.get(text_class.model_type, {}) | STRUCTURE.get(model_type, {})
    given = {name: _sized(part, ENCODER, {}).to_dict() for name, part in _encoders(config_class).items()}
    given["text_config"] = _sized(text_class, SIZES, own).to_dict()
    return _sized(config_class, {"initializer_range": 0.2} | MEDIA, {}, **given)


def _encoders(config_class: Any) -> dict[str, Any]:
    default = config_class()
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs if name != "text_config"}
    return {name: type(part) for name, part in parts.items() if part is not None}


def _sized(config_class: Any, sizes: dict[str, Any], own: dict[str, Any], **given: Any) -> Any:
    default, sizes = config_class().to_dict(), sizes | own
    renamed = getattr(config_class, "attribute_map", None) or {}
    known = {name: renamed.get(name, name) for name in sizes if name in default or renamed.get(name) in default}
    changes = {
        name: sizes[name]
        for name, real in known.items()
        if default.get(name, default.get(real)) is not None or name not in ABSENT_STAYS or name in own
    }
    if "kv_lora_rank" in changes:  # latent attention has as many key heads as heads
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    return config_class(**(changes | given))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Biases and sinks start at one value, where a forgotten one would go unnoticed."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.is_floating_point():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        elif "sink" in name and parameter.ndim == 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 1.0)
