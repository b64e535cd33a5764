"""Tokens that may not come next, taken out of the logits by a mask of one bit a token."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.rows import check_floating
from kernels.dispatch import choose_portable, implementation, on_its_gpu

BITS = 32


@on_its_gpu
def mask_tokens(logits: Tensor, masks: Tensor, masked: Tensor, *, impl: str = "auto") -> None:
    """Set logits to minus infinity, in place, where a row is masked and its bit is 0; other rows are not touched.

    logits: [S, V] bfloat16, float16 or float32. masks: int32 [S, W], W >= ceil(V / 32); bit t % 32 of word t // 32 is
    token t. masked: int32 [S], 0 for a row that stays as it is. Rows may be strided.
    Raises ValueError for shapes, types or layouts that do not fit.
    """
    check_floating("mask_tokens", logits)
    if logits.ndim != 2:
        raise ValueError(f"mask_tokens: logits must be [S, V], got {tuple(logits.shape)}")
    S, V = logits.shape
    if masks.dtype != torch.int32 or masks.ndim != 2 or masks.shape[0] != S or masks.shape[1] * BITS < V:
        raise ValueError(
            f"mask_tokens: masks must be int32 [{S}, at least {-(-V // BITS)}], got {masks.dtype} {tuple(masks.shape)}"
        )
    if masked.dtype != torch.int32 or masked.shape != (S,):
        raise ValueError(f"mask_tokens: masked must be int32 [{S}], got {masked.dtype} {tuple(masked.shape)}")
    if masks.shape[1] > 1 and masks.stride(1) != 1:
        raise ValueError(f"mask_tokens: the words of a row must be contiguous, got strides {masks.stride()}")
    choice = choose_portable("mask_tokens", logits.device, impl)
    implementation("token_mask", choice).mask_tokens(logits, masks, masked)
