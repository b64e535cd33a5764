"""Rows of the selection benchmark for the estimator bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.bound_scores import bound_scores

BLOCK = 128
# (queries to a row, keys to a bound)
SIZES = ((2, 16), (4, 8), (2, 32))


def bound_case(q: Tensor, k: Tensor, group: int, span: int) -> tuple[Callable[[], Tensor], float, str]:
    """(call, its flops, what is wrong with it or ""): two heads' last rows against float64. q, k: [1, H, L, D]."""
    call = partial(bound_scores, q, k, group=group, span=span)
    scores = call()
    n, share, length, D = scores.shape[3], q.shape[1] // k.shape[1], q.shape[2], q.shape[3]
    # Two products of D channels for each pair of a row and a span that it sees.
    flops = 2 * 2 * D * q.shape[1] * (length // group) * (length // span) / 2
    last = torch.arange(length - BLOCK + group - 1, length, group, device=q.device)
    for head in (0, q.shape[1] - 1):
        rows = q[0, head, -BLOCK:].double().unflatten(0, (-1, group)).mean(1) * D**-0.5
        keys = k[0, head // share].unflatten(0, (-1, span)).double()
        bounds = rows.clamp(min=0) @ keys.amax(1).T + rows.clamp(max=0) @ keys.amin(1).T
        bounds.masked_fill_(torch.arange(0, length, span, device=q.device) > last[:, None], -torch.inf)
        wanted = bounds.unflatten(-1, (n, BLOCK // span)).amax(-1).softmax(-1).amax(0)
        error = float(((scores[0, head, -1].double() - wanted) / wanted).abs().max())
        if not error < 5e-2:  # rows rounded to bfloat16 move bounds of this size by as much
            return call, flops, f"bound head {head}: relative error {error:.1e}"
    return call, flops, ""
