"""Rotary position embedding of queries and keys in one pass (rotate-half pairing)."""

from __future__ import annotations

from torch import Tensor

from kernels._common.rows import FLOATING, check_floating, choose_row_kernel
from kernels.dispatch import implementation, on_its_gpu


@on_its_gpu
def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate the first R of D dimensions: x * cos + rotate_half(x) * sin, with transformers' rounding.

    q [N, H, L, D], k [N, Hkv, L, D]: bfloat16, float16 or float32, last dimension contiguous, other strides free.
    cos, sin: [N or 1, L, R] as transformers' rotary modules make them, R <= D even; the dimensions past R are copied.
        Their dtype is that of q, or float32, in which case everything is computed in float32 and rounded once.
    Returns new q and k of the same shapes and dtype, each a view of [N, L, heads, D].
    Raises ValueError for shapes, types or layouts that do not fit.
    """
    choice = choose_row_kernel("apply_rope", q.device, impl)
    check_floating("apply_rope", q, k, backward=choice.impl == "reference")
    check_floating("apply_rope", cos, sin, backward=choice.impl == "reference")
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"apply_rope: q [N, H, L, D] and k [N, Hkv, L, D] must agree, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    N, _, L, D = q.shape
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, N) or cos.shape[1] != L:
        raise ValueError(
            f"apply_rope: cos and sin must be [{N} or 1, {L}, R], got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    R = cos.shape[2]
    if R % 2 or not 0 < R <= D:
        raise ValueError(f"apply_rope: the rotated dimensions must be an even number up to {D}, got {R}")
    if cos.dtype not in (q.dtype, FLOATING[-1]):
        raise ValueError(f"apply_rope: cos and sin must be {q.dtype} or float32, got {cos.dtype}")
    if any(t.device != q.device for t in (k, cos, sin)):
        raise ValueError("apply_rope: q, k, cos and sin must be on one device")
    return implementation("rope", choice).apply_rope(q, k, cos, sin)
