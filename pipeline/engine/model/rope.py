"""Rotary embeddings whose frequencies depend on the document: chosen per document, not per batch.

transformers switches LongRoPE models (Phi-3 128K) between two sets of frequencies by the largest position of the whole
call. In a ragged batch one long document would switch its neighbours, and in chunked prefill the first chunks would be
rotated unlike the last. Here every document takes one set for its whole life, by its prompt and output bound together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.config import EngineError


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
