"""fp8 rows of the selection benchmark: attention mass from keys in fp8, decode attention from an fp8 arena."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.block_scores import mass_scores
from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.fp8_heads.reference import quantize, restore_keys
from tools.benchmark._attention_fp8 import Fp8Layer

BLOCK = 128


def mass_case(layer: Fp8Layer, group: int) -> tuple[Callable[[], Tensor], str]:
    """(call, what is wrong with it or ""): two heads' last rows against the same roundings in float64."""
    call = partial(mass_scores, layer.q, layer.arenas[0][None], group=group, scales=layer.scales)
    scores = call()
    for head in (0, layer.q.shape[1] - 1):
        wanted = true_mass(layer, group, head)
        error = float(((scores[0, head, -1].double() - wanted) / wanted).abs().max())
        if not error < 5e-2:  # a mean that rounds the other way moves its row by up to 6% of one of D products
            return call, f"mass head {head}: relative error {error:.1e}"
    return call, ""


def true_mass(layer: Fp8Layer, group: int, head: int) -> Tensor:
    """float64 [blocks]: the scores of the last query block of a head; the length is a multiple of BLOCK."""
    length = layer.q.shape[2]
    rows = layer.q[0, head, -BLOCK:].float().unflatten(0, (-1, group)).mean(1)
    rows = quantize(rows, layer.scales.q[head]).double() * layer.scales.q[head]
    logits = rows @ layer.exact(head)[1].mT * rows.shape[-1] ** -0.5
    last = torch.arange(length - BLOCK + group - 1, length, group, device=rows.device)
    logits.masked_fill_(torch.arange(length, device=rows.device) > last[:, None], -torch.inf)
    return logits.softmax(-1).unflatten(-1, (-1, BLOCK)).sum(-1).amax(0)


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
