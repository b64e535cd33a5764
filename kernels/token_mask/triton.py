"""Masked logits in Triton: only what is masked is written, and nothing is read but the mask."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def mask_tokens_kernel(logits, masks, masked, V, logits_stride, masks_stride, masked_stride, BLOCK: tl.constexpr):
    """Program (row, block of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(masked + row * masked_stride) != 0:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        word = tl.load(masks + row * masks_stride + token // 32, mask=inside, other=0)
        forbidden = ((word >> (token % 32)) & 1) == 0
        minus_infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(logits.dtype.element_ty)
        tl.store(logits + row * logits_stride + token, minus_infinity, mask=inside & forbidden)


def mask_tokens(logits: Tensor, masks: Tensor, masked: Tensor) -> None:
    """See kernels.token_mask.reference."""
    S, V = logits.shape
    if S and V:
        mask_tokens_kernel[(S, triton.cdiv(V, BLOCK))](
            logits, masks, masked, V, logits.stride(0), masks.stride(0), masked.stride(0), BLOCK=BLOCK, num_warps=4
        )
