"""Switches a transformers model to Stem attention and back."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from stem_core.attention import attention_forward
from stem_core.config import StemConfig
from stem_core.policy import LayerPolicy

# Must not contain "flash", "sdpa" or "flex_attention": transformers reads meaning into such names.
ATTENTION_NAME = "stem"

OTHER_MODELS = (
    "use one that is part of transformers and uses AttentionInterface (Qwen3, Llama 3, Mistral, Gemma 3, say)"
)

Model = TypeVar("Model", bound=nn.Module)

# The attention each patched model had before, to give it back.
_previous: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class UnsupportedModelError(ValueError):
    """The model computes something in its attention that Stem's kernels do not."""


def patch_model(model: Model, config: StemConfig | None) -> Model:
    """Make `model` prefill with Stem sparse attention; decoding stays dense. Changes the model in place and returns it.

    model: any transformers decoder whose layers go through AttentionInterface.
    config: None runs dense attention through the same kernels.
    A prompt must arrive in one piece (plain `model(...)` or `model.generate(...)`) or with a PrefillContext for each
    chunk. Raises UnsupportedModelError naming the feature when the model's attention is not plain causal
    attention with an optional sliding window.
    """
    check_model(model)
    modules = list(_attention_modules(model))
    _register()
    if model not in _previous:
        _previous[model] = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    for layer, module in modules:
        module.stem_policy = LayerPolicy(config, layer)  # type: ignore[assignment]
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    return model


def unpatch_model(model: Model) -> Model:
    """Give a patched model its own attention back; a model that is not patched stays as it is."""
    previous = _previous.pop(model, None)
    if previous is not None:
        model.set_attn_implementation(previous)  # type: ignore[operator]
        for _, module in _attention_modules(model):
            del module.stem_policy
    return model


def layer_policies(model: nn.Module) -> Iterator[LayerPolicy]:
    """The policy of each attention layer of a patched model."""
    for _, module in _attention_modules(model):
        policy = getattr(module, "stem_policy", None)
        if isinstance(policy, LayerPolicy):
            yield policy


def attention_layers(model: nn.Module) -> list[int]:
    """Indices of the layers that attend; those of other kinds (linear attention, convolutions) are left out."""
    return sorted({layer for layer, _ in _attention_modules(model)})


def keep_dense(model: nn.Module, layers: Collection[int]) -> None:
    """Leave some layers of a patched model dense, whatever it was patched with."""
    for layer, module in _attention_modules(model):
        if layer in layers:
            module.stem_policy = LayerPolicy(None, layer)  # type: ignore[assignment]


def _attention_modules(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(layer index, module) of the self-attention modules of the decoder."""
    for module in model.modules():
        if "Attention" in type(module).__name__ and isinstance(getattr(module, "layer_idx", None), int):
            yield module.layer_idx, module  # type: ignore[misc]


def check_model(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the feature, as patch_model does, and change nothing.

    Weights are not looked at: the model may be on the device "meta".
    """
    modules = [module for _, module in _attention_modules(model)]
    name = type(model).__name__
    config = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[union-attr, operator]
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank: DeepSeek V2 and V3, Kimi K2, GLM): it keeps one "
            "compressed vector for all heads, and our kernels read keys and values; use a model with grouped-query "
            "attention (Qwen3, Llama 3, Mistral, say)"
        )
    attachable = hasattr(model, "set_attn_implementation") and bool(modules)
    if not attachable or not all(_uses_interface(model, module) for module in modules):
        raise UnsupportedModelError(f"{name} {_obstacle(attachable)}; {OTHER_MODELS}")
    features = {
        "logit soft-capping (attn_logit_softcapping)": getattr(config, "attn_logit_softcapping", None),
        "chunked attention (attention_chunk_size)": getattr(config, "attention_chunk_size", None),
        "position biases (ALiBi)": getattr(config, "alibi", None),
        "attention that is not causal": any(getattr(module, "is_causal", True) is False for module in modules),
    }
    for feature, present in features.items():
        if present:
            raise UnsupportedModelError(
                f"{name} uses {feature}, which our kernels do not compute, neither sparse nor dense; use another model "
                "(docs/models.md lists those that run)"
            )


def _uses_interface(model: nn.Module, module: nn.Module) -> bool:
    """Whether an attention goes through AttentionInterface: the model says so, or the module's code looks it up there.

    Hybrids with linear attention do not say so, although their full-attention layers do it.
    """
    if getattr(model, "_supports_attention_backend", False):
        return True
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _obstacle(has_attention: bool) -> str:
    """Why the attention of a model cannot be exchanged."""
    if not has_attention:
        return "has no attention layers that go through transformers' AttentionInterface"
    return "computes its attention itself, not through transformers' AttentionInterface"


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface: None where nothing is padded, else bool [batch, kv_length]; never N x N.

    Raises ValueError for masks that are more than causal, sliding-window and padding (packed sequences, images).
    """
    if q_length > 1 and not allow_is_causal_skip:
        raise ValueError(
            "Stem attention takes one causal sequence a row: packed sequences and custom masks do not go with it"
        )
    if attention_mask is None:
        return None
    # Layers with a sliding-window cache hold the last tokens only.
    attention_mask = attention_mask[:, -kv_length:].bool()
    return None if attention_mask.all() else attention_mask


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)
