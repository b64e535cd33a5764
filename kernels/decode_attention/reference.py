"""Decode attention in plain torch: the specification, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from kernels._common.prefixes import Prefixes


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """See kernels.decode_attention. `max_length` is not needed here: lengths are read on the host.

    A row with a prefix attends to the keys of both places laid behind one another. Neighbours that see nothing but
    stretches of one prefix go together, so that its keys are read once.
    """
    S, H, D = q.shape
    kv_heads = k.shape[0]
    out = torch.zeros_like(q)
    before_starts, before = [0] * S, [0] * S
    if prefixes is not None:
        before_starts, before = prefixes.starts.tolist(), prefixes.lengths.tolist()
    own_starts, own = starts.tolist(), lengths.tolist()
    for rows in _together(before_starts, before, own):
        ends = [before[s] + own[s] for s in rows]
        if max(ends) == 0:
            continue
        begins = [0 if window is None else max(0, end - window) for end in ends]
        s, first, prefix = rows[0], min(begins), max(before[s] for s in rows)
        these = slice(s, s + len(rows))
        seen = slice(own_starts[s] + max(0, first - prefix), own_starts[s] + own[s])
        shared = slice(before_starts[s] + min(first, prefix), before_starts[s] + prefix)
        keys, values = (
            (torch.cat([x[:, shared], x[:, seen]], dim=1) if own[s] and prefix else x[:, shared if prefix else seen])
            for x in (k, v)
        )
        queries = q[these].float().view(len(rows), kv_heads, H // kv_heads, D).transpose(0, 1)
        logits = (queries.flatten(1, 2) @ keys.float().mT * scale).unflatten(1, queries.shape[1:3])
        if len(rows) > 1:
            place = torch.arange(first, first + keys.shape[1], device=q.device)
            for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                logits[:, row].masked_fill_((place < begin) | (place >= end), float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(kv_heads, 1, H // kv_heads, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : keys.shape[1]]
        found = (weights.flatten(1, 2) @ values.float()).unflatten(1, queries.shape[1:3])
        out[these] = found.transpose(0, 1).reshape(len(rows), H, D).to(q.dtype)
    return out


def _together(starts: list[int], lengths: list[int], own: list[int]) -> Iterator[list[int]]:
    """Rows that are computed together: neighbours whose prefixes begin at one place and that have no keys of their own,
    each of the others alone.

    starts, lengths: of the prefixes. own: keys of their own.
    """

    def group(row: int) -> tuple[int, int]:
        return (starts[row], -1) if lengths[row] and not own[row] else (0, row)

    for _, rows in groupby(range(len(own)), key=group):
        yield list(rows)
