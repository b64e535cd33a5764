"""A row of the selection benchmark: decode attention from an fp8 arena."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.fp8_heads.reference import restore_keys
from tools.benchmark._attention_fp8 import Fp8Layer


def decode_case(layer: Fp8Layer, q: Tensor, documents: int) -> tuple[Callable[[], Tensor], str]:
    """(call, what is wrong with it or ""): q [documents, H, D], the layer's keys cut into as many equal extents."""
    k8, vt8 = layer.arenas
    length = k8.shape[1] // documents // 16 * 16
    starts = torch.arange(documents, device=q.device) * length
    lengths = torch.full((documents,), length, dtype=torch.int32, device=q.device)
    call = partial(decode_attention_fp8, q, k8, vt8, layer.scales, starts, lengths, max_length=length)
    got = call()
    for s in (0, documents - 1):
        extent = slice(s * length, (s + 1) * length)
        keys = k8[:, extent].float() * layer.scales.k[:, None, None]
        values = restore_keys(vt8[..., extent].contiguous()).mT.float() * layer.scales.v[:, None, None]
        grouped = q[s].float().unflatten(0, (k8.shape[0], -1))
        wanted = ((grouped @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values).flatten(0, 1)
        error = float((got[s].float() - wanted).norm() / wanted.norm())
        if not error < 1e-2:
            return call, f"decode document {s}: relative error {error:.1e}"
    return call, ""
