"""fp8 heads in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import KEY_GROUP, HeadScales, quantize, restore_keys, store_order


def quantize_heads(x: Tensor, scale: Tensor) -> Tensor:
    """See kernels.fp8_heads."""
    return quantize(x.transpose(1, 2), scale[:, None]).contiguous().transpose(1, 2)


def write_kv(k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, start: int) -> None:
    """See kernels.fp8_heads."""
    tokens = k.shape[2]
    k_arena[:, start : start + tokens] = quantize(scales.shifted(k[0]), scales.k[:, None, None])
    values = torch.nn.functional.pad(v[0].float(), (0, 0, 0, -tokens % KEY_GROUP))
    stored = store_order(quantize(values, scales.v[:, None, None]).mT)
    vt_arena[..., start : start + stored.shape[-1]] = stored


def append_kv(
    k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, slots: Tensor, run: int = 1
) -> None:
    """See kernels.fp8_heads. Tokens are written one after the other, so that `run` is not needed."""
    for s, slot in enumerate(slots.tolist()):
        k_arena[:, slot] = quantize(scales.shifted(k[s]), scales.k[:, None])
        group = slot // KEY_GROUP * KEY_GROUP
        columns = vt_arena[..., group : group + KEY_GROUP]
        values = restore_keys(columns.float() if slot > group else torch.zeros_like(columns, dtype=torch.float32))
        values[..., slot - group] = quantize(v[s], scales.v[:, None]).float()
        columns.copy_(store_order(values))
