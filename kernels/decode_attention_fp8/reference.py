"""fp8 decode attention in plain torch: the specification, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import KEY_GROUP, HeadScales, restore_keys
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
) -> Tensor:
    """See kernels.decode_attention_fp8. Dequantises one document after the other."""
    out = torch.empty_like(q)
    zero = torch.zeros(1, dtype=torch.int64, device=q.device)
    for s, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        end = start + -(-length // KEY_GROUP) * KEY_GROUP
        keys = k[:, start : start + length].float() * scales.k[:, None, None]
        values = restore_keys(vt[..., start:end])[..., :length].mT.float() * scales.v[:, None, None]
        document = slice(s, s + 1)
        out[document] = decode_attention(
            q[document],
            keys,
            values,
            zero,
            lengths[document],
            max_length=max_length,
            scale=scale,
            window=window,
            sinks=sinks,
            impl="reference",
        )
    return out
