"""fp8 heads in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import BIAS_HEADS, KEY_GROUP, HeadScales, quantize, restore_keys, split_bias, store_order


def quantize_heads(x: Tensor, scale: Tensor, mean: Tensor | None) -> Tensor:
    """See kernels.fp8_heads."""
    if mean is not None:
        x = x.float() - mean[:, None]
    return quantize(x.transpose(1, 2), scale[:, None]).contiguous().transpose(1, 2)


def key_bias(k: Tensor, scales: HeadScales, bias: Tensor, start: int) -> None:
    """See kernels.fp8_heads. Sums in float64, so that they do not depend on how many keys there are."""
    assert scales.q_mean is not None
    kv_heads, tokens, dim = k.shape[1:]
    means = (scales.q_mean.double() / scales.q[:, None]).view(kv_heads, -1, dim)
    products = means @ scales.shifted(k[0]).double().mT / scales.k[:, None, None]  # [Hkv, G, L]
    parts = split_bias(torch.nn.functional.pad(products, (0, 0, 0, -products.shape[1] % BIAS_HEADS)))
    bias[:, :, start : start + tokens] = parts.unflatten(1, (-1, BIAS_HEADS)).movedim(2, 3).flatten(3)


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
