"""Views of q, k, v and out that Hopper's tensor memory accelerator (TMA) can address: no copies.

Every operand is addressed as [N, heads, tokens, D] with its own strides and a box of [1, 1, tokens, D], so a
transposed [N, L, H, D] tensor, a slice of it and an extent of a KV arena are all read in place. The hardware
fills reads past the last token with zeros and drops writes past it, which is what a ragged last block needs.
"""

from __future__ import annotations

from torch import Tensor


def tma_obstacle(*tensors: Tensor) -> str:
    """Why TMA cannot address one of `tensors` ([N, heads, tokens, D]); empty if it can address all."""
    for tensor in tensors:
        size = tensor.element_size()
        if tensor.data_ptr() % 16:
            return "a tensor does not start at a multiple of 16 bytes"
        if tensor.stride(-1) != 1:
            return "the last dimension of a tensor is not contiguous"
        for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if length > 1 and (stride * size) % 16:
                return f"a stride of {stride * size} bytes is not a multiple of 16"
            if length > 1 and not 0 < stride * size < 1 << 40:
                return f"a stride of {stride * size} bytes is out of range"
    return ""


def tma_strides(tensor: Tensor) -> list[int]:
    """Element strides of `tensor`; dimensions of length 1, whose stride means nothing, get a legal one."""
    return [
        stride if length > 1 or dim == tensor.ndim - 1 else max(8, tensor.shape[-1])
        for dim, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    ]
