"""Rows of the selection benchmark for the estimator sample, of keys in 16 bits and in fp8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.fp8_heads.reference import quantize
from kernels.sample_scores import PEAKS, sample_scores
from tools.benchmark._attention_fp8 import Fp8Layer

BLOCK = 128


def sample_case(q: Tensor, k: Tensor, every: int) -> tuple[Callable[[], Tensor], str]:
    """(call, what is wrong with it or ""): two heads' last rows in float64. The length is a multiple of BLOCK."""
    call = partial(sample_scores, q, k, block_size=BLOCK, every=every)
    group = q.shape[1] // k.shape[1]

    def truth(head: int) -> Tensor:
        return true_shares(q[0, head, -BLOCK:].double(), k[0, head // group].double(), every)

    return call, _wrong(call(), truth)


def fp8_case(layer: Fp8Layer, every: int) -> tuple[Callable[[], Tensor], str]:
    """As sample_case, against the same roundings in float64."""
    call = partial(
        sample_scores, layer.q, layer.arenas[0][None], block_size=BLOCK, every=every, scales=layer.scales
    )  # fmt: skip
    return call, _wrong(call(), lambda head: true_fp8_shares(layer, every, head))


def true_fp8_shares(layer: Fp8Layer, every: int, head: int) -> Tensor:
    """float64 [blocks]: what the last query block of a head should get from its queries and keys in fp8."""
    scale = layer.scales.q[head]
    rounded = quantize(layer.q[0, head, -BLOCK:].float(), scale).double() * scale
    return true_shares(rounded, layer.exact(head)[1], every)


def true_shares(q: Tensor, k: Tensor, every: int) -> Tensor:
    """float64 [blocks]: the scores of a head's last query block q [BLOCK, D] over its keys k [tokens, D]."""
    length = len(k)
    last = torch.arange(length - BLOCK + every - 1, length, every, device=k.device)
    logits = q[last - length] @ k.mT * k.shape[-1] ** -0.5
    logits.masked_fill_(torch.arange(length, device=k.device) > last[:, None], -torch.inf)
    peaks = logits.unflatten(-1, (-1, BLOCK // (2 * PEAKS), PEAKS, 2)).amax(dim=(-3, -1))
    return peaks.logsumexp(-1).softmax(-1).amax(0)


def _wrong(scores: Tensor, truth: Callable[[int], Tensor]) -> str:
    for head in (0, scores.shape[1] - 1):
        wanted = truth(head)
        error = float(((scores[0, head, -1].double() - wanted) / wanted).abs().max())
        if not error < 2e-2:
            return f"sample head {head}: relative error {error:.1e}"
    return ""
