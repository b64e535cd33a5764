"""What a model's config alone tells of it: its modules without memory, what a token and a chunk of them take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig, EngineError, ModelRefusedError
from pipeline.engine.kv.arena import LayerShape
from pipeline.engine.kv.states import CONV, RECURRENT, StateKey, StateShape
from pipeline.engine.model.checkpoint import ModelLoadError
from pipeline.engine.model.precision import Precision, check_fp8_attention
from pipeline.engine.model.text_part import model_class
from stem_core.errors import first_line
from stem_core.fp8 import quantize_linears, sensitive_linears, storage
from stem_core.patch import UnsupportedModelError, attention_layers, check_model

# Allocator fragmentation, cuBLAS workspaces and what else a process takes unasked.
SLACK_BYTES = 512 * 2**20


def checked_architecture(config: EngineConfig, hf_config: Any, precision: Precision) -> nn.Module:
    """The architecture on the device "meta", which takes a quarter of a second for a model of 80 layers.

    Raises ModelRefusedError where our kernels do not compute its attention, or not in this precision, ModelLoadError
    where transformers makes no model of the config.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = model_class(hf_config, config.trust_remote_code).from_config(
                hf_config, dtype=precision.dtype, trust_remote_code=config.trust_remote_code
            )
    except EngineError:
        raise
    except Exception as error:  # whatever its code comes to with such values
        raise ModelLoadError(
            f"cannot load model {config.model!r}: its config makes no model: {first_line(error)}"
        ) from error
    try:
        check_model(model)
    except UnsupportedModelError as error:
        raise ModelRefusedError(f"model {config.model!r} cannot run here: {error}") from error
    if precision.fp8:
        shapes = cached_shapes(hf_config, model)
        check_fp8_attention(shapes, config.attention, set(attention_layers(model)) - set(shapes))
    return model


def meta_model(config: EngineConfig, hf_config: Any, precision: Precision) -> nn.Module:
    """`checked_architecture`, those linears in fp8 that the engine has in it. Raises what that raises."""
    model = checked_architecture(config, hf_config, precision)
    if not precision.fp8:
        return model
    stored = storage(hf_config)
    skip = ("lm_head",) if stored is not None and stored.kept else sensitive_linears(model)
    with torch.device("meta"):
        return quantize_linears(model, skip)


def cached_shapes(hf_config: Any, model: nn.Module) -> dict[int, LayerShape]:
    """By layer, what it caches of a token, as far as the config tells. model: on whatever device.

    Left out are layers that read another's keys, and those that do not attend.
    """
    text = hf_config.get_text_config()
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    layers = _layer_configs(text)
    return {layer: _layer_shape(layers[layer]) for layer in attention_layers(model) if layer < own}


def state_shapes(model: nn.Module, precision: Precision) -> dict[StateKey, StateShape]:
    """What layers of linear attention keep of a document, as far as their modules tell (the engine's probe sees it).

    A gated delta rule keeps a matrix for each head of its values, Mamba-2 one for each head, a short convolution alone
    nothing more.
    """
    found: dict[StateKey, StateShape] = {}
    for module in model.modules():
        conv = next((child for child in module.children() if isinstance(child, nn.Conv1d)), None)
        layer = getattr(module, "layer_idx", None)
        if conv is None or not isinstance(layer, int):
            continue
        found[StateKey(CONV, layer)] = StateShape((conv.out_channels, conv.kernel_size[0]), precision.dtype)
        for names in (("num_v_heads", "head_k_dim", "head_v_dim"), ("num_heads", "head_dim", "ssm_state_size")):
            sizes = tuple(getattr(module, name, None) for name in names)
            if None not in sizes:
                found[StateKey(RECURRENT, layer)] = StateShape(sizes, torch.float32)  # type: ignore[arg-type]
                break
    return found


def chunk_bytes(config: EngineConfig, hf_config: Any, precision: Precision) -> int:
    """Roughly what a prefill chunk takes beside weights and KV (the engine measures it)."""
    text = hf_config.get_text_config()
    widest = 0
    for layer in _layer_configs(text):
        inner = getattr(layer, "intermediate_size", 4 * text.hidden_size)
        widest = max([widest, *(inner if isinstance(inner, list | tuple) else [inner])])
    return config.chunk_tokens * (3 * widest + 6 * text.hidden_size) * precision.dtype.itemsize + SLACK_BYTES


def _layer_configs(text: Any) -> list[Any]:
    """By layer, the config: one for all, unless sizes differ between layers."""
    if getattr(text, "per_layer_attributes", None):
        return [text.per_layer_config[layer] for layer in range(text.num_hidden_layers)]
    return [text] * text.num_hidden_layers


def _layer_shape(layer: Any) -> LayerShape:
    heads = layer.num_attention_heads
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return LayerShape(getattr(layer, "num_key_value_heads", None) or heads, head_dim, head_dim)
