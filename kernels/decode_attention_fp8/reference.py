"""fp8 decode attention in plain torch: the specification, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import KEY_GROUP, HeadScales, restore_keys, widen
from kernels._common.prefixes import Prefixes
from kernels.decode_attention import decode_attention


def decode_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """See kernels.decode_attention_fp8. Dequantises one document after the other, its prefix before its own keys."""
    out = torch.empty_like(q)
    zero = torch.zeros(1, dtype=torch.int64, device=q.device)
    for s in range(q.shape[0]):
        parts = [(int(starts[s]), int(lengths[s]))]
        if prefixes is not None:
            parts.insert(0, (int(prefixes.starts[s]), int(prefixes.lengths[s])))
        both = [_dequantised(k, vt, scales, *part) for part in parts]
        keys, values = (torch.cat(tensors, dim=1) for tensors in zip(*both, strict=True))
        document = slice(s, s + 1)
        out[document] = decode_attention(
            q[document],
            keys,
            values,
            zero,
            torch.full_like(lengths[document], keys.shape[1]),
            max_length=max_length,
            scale=scale,
            window=window,
            sinks=sinks,
            impl="reference",
        )
    return out


def _dequantised(k: Tensor, vt: Tensor, scales: HeadScales, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values float32 [Hkv, length, D] of arena rows [start, start + length)."""
    end = start + -(-length // KEY_GROUP) * KEY_GROUP
    keys = widen(k[:, start : start + length]) * scales.k[:, None, None]
    values = widen(restore_keys(vt[..., start:end])[..., :length].mT) * scales.v[:, None, None]
    return keys, values
