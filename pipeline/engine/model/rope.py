"""Rotary embeddings: stretched to a longer context, and, where frequencies depend on the document, chosen by document.

transformers switches LongRoPE models (Phi-3 128K) between two sets of frequencies by the largest position of the whole
call. In a ragged batch one long document would switch its neighbours, and in chunked prefill the first chunks would be
rotated unlike the last. Here every document takes one set for its whole life, by its prompt and output bound together;
where several requests share the beginning of their prompts, by the tokens of that alone, whatever follows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.config import EngineError

# YaRN by more is not proposed: models that were published with it are, by 4 at most.
MOST_HINTED = 8


def yarn_obstacle(hf_config: Any) -> str:
    """Why the context of a model with this transformers config cannot be stretched by YaRN; empty if it can."""
    text = hf_config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not rope or "rope_theta" not in _flat(rope):
        return "it has no rotary position embedding"
    kinds = sorted({part.get("rope_type", "default") for part in _parts(rope)} - {"default"})
    if kinds:
        return f"its config scales its rotary embedding already (rope_type {', '.join(kinds)})"
    if len(_parts(rope)) > 1:
        return "its layers have rotary embeddings of different kinds"
    if not isinstance(getattr(text, "max_position_embeddings", None), int):
        return "its config does not say for what context it was made (max_position_embeddings)"
    return ""


def stretch(hf_config: Any, factor: float) -> None:
    """Give a transformers config, in place, a context `factor` times as long, by YaRN (Peng et al. 2023,
    arXiv:2309.00071) as transformers computes it. Raises EngineError where that cannot be.
    """
    obstacle = yarn_obstacle(hf_config)
    if obstacle:
        raise EngineError(f"--rope-scaling {factor:g}: this model's context cannot be stretched: {obstacle}")
    text = hf_config.get_text_config()
    limit = text.max_position_embeddings
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": limit}
    text.rope_parameters = {**text.rope_parameters, **yarn}
    text.max_position_embeddings = int(limit * factor)


def stretch_hint(hf_config: Any, tokens: int) -> str:
    """The factor that makes room for a document of so many tokens, prompt and output, as a sentence.

    hf_config: as the checkpoint has it. Empty if the model's own context holds them, if it cannot be stretched, or if
    it would have to be by more than MOST_HINTED.
    """
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None) or tokens
    factor = math.ceil(10 * tokens / limit) / 10
    if yarn_obstacle(hf_config) or not 1 < factor <= MOST_HINTED:
        return ""
    return f"--rope-scaling {factor:g} would make room for it: the model was made for {limit:,} tokens"


def _parts(rope: Any) -> list[dict[str, Any]]:
    """rope_parameters of a model, or those of each type of its layers."""
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _flat(rope: Any) -> dict[str, Any]:
    return {name: value for part in _parts(rope) for name, value in part.items()}


class RopeBounds:
    """The token bound (prompt + max_new_tokens) of each row of the running batch, read by LongRoPE modules.

    rows: int64 [N].
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None


def prepare_rope(model: nn.Module) -> RopeBounds:
    """Make the model's rotary embeddings independent of the batch. Raises EngineError for types that cannot be."""
    bounds = RopeBounds()
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if "RotaryEmbedding" not in type(module).__name__ or rope_type is None:
            continue
        types = list(rope_type.values()) if isinstance(rope_type, dict) else [rope_type]
        if any("dynamic" in name for name in types):
            raise EngineError(
                "this model scales its rotary embedding dynamically (rope_type 'dynamic'): its frequencies change with "
                "what was computed before, so results would depend on the batch; set rope_type 'yarn' or 'linear' in "
                "the model's config"
            )
        if "longrope" in types:
            if isinstance(rope_type, dict):
                raise EngineError("LongRoPE that differs between layer types is not supported")
            _install(module, bounds)
    return bounds


def _install(module: Any, bounds: RopeBounds) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    limit = module.config.rope_parameters["original_max_position_embeddings"]
    device = module.inv_freq.device
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=limit + 1)
    module.register_buffer("long_inv_freq", long.to(device), persistent=False)
    module.forward = partial(_longrope_forward, module, bounds, limit)


def _longrope_forward(
    module: Any, bounds: RopeBounds, limit: int, x: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """x: any tensor of the wanted dtype; position_ids [N, L]. Returns cos, sin [N, L, rotary dim]."""
    if bounds.rows is None:
        raise RuntimeError("LongRoPE needs the documents' token bounds: set RopeBounds.rows before the model runs")
    is_long = bounds.rows[:, None] > limit
    frequencies = torch.where(is_long, module.long_inv_freq, module.original_inv_freq).float()
    angles = position_ids[..., None].float() * frequencies[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling
    return cos.to(x.dtype), sin.to(x.dtype)
