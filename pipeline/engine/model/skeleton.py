"""What a model's config alone tells of it: its modules without memory, what a token and a chunk of them take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig
from pipeline.engine.kv.arena import LayerShape
from pipeline.engine.model.precision import Precision
from pipeline.engine.model.text_part import model_class
from stem_core.fp8 import quantize_linears

# Allocator fragmentation, cuBLAS workspaces and what else a process takes unasked.
SLACK_BYTES = 512 * 2**20


def skeleton(config: EngineConfig, hf_config: Any, precision: Precision) -> nn.Module:
    """The architecture on the device "meta", its linears in fp8 if that is the precision."""
    with torch.device("meta"):
        model = model_class(hf_config, config.trust_remote_code).from_config(
            hf_config, dtype=precision.dtype, trust_remote_code=config.trust_remote_code
        )
        return quantize_linears(model) if precision.fp8 else model


def layer_shape(hf_config: Any) -> LayerShape:
    """What a layer caches of a token, as far as the config tells."""
    text = hf_config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return LayerShape(getattr(text, "num_key_value_heads", None) or heads, head_dim, head_dim)


def chunk_bytes(config: EngineConfig, hf_config: Any, precision: Precision) -> int:
    """Roughly what a prefill chunk takes beside weights and KV (the engine measures it)."""
    text = hf_config.get_text_config()
    widest = 3 * getattr(text, "intermediate_size", 4 * text.hidden_size) + 6 * text.hidden_size
    return config.chunk_tokens * widest * precision.dtype.itemsize + SLACK_BYTES
