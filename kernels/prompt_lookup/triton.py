"""Prompt lookup in Triton: every place of a document is looked at once, and the best one is a maximum.

A place is the number (tokens matched, place), in this order of bits, so that the largest is the longest match and,
of several, the latest: the result does not depend on the order in which programs finish.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.sizes import ceil_div, power_of_2

BLOCK = 2048
PLACE_BITS = tl.constexpr(40)


@triton.jit
def slot_of(position, start, prefix_start, prefix_length):
    """Where the token at a position of the document lies."""
    return tl.where(position < prefix_length, prefix_start + position, start + position - prefix_length)


@triton.jit
def match_kernel(
    ids, starts, lengths, prefix_starts, prefix_lengths, best,
    LONGEST: tl.constexpr, SHORTEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of places, document): a place is that of the token behind a match. best: zeros int64 [S]."""
    s = tl.program_id(1)
    length = tl.load(lengths + s)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < length:
        start = tl.load(starts + s)
        prefix_start = tl.zeros_like(start)
        prefix_length = tl.zeros_like(start)
        if prefix_starts is not None:
            prefix_start = tl.load(prefix_starts + s)
            prefix_length = tl.load(prefix_lengths + s)
        place = first + tl.arange(0, BLOCK)
        going_on = place < length
        matched = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(1, LONGEST + 1):
            going_on = going_on & (place >= back)
            # Where the document has not so many tokens, no place has either.
            newest = tl.load(ids + slot_of(length - back, start, prefix_start, prefix_length), mask=length > back)
            found = tl.load(ids + slot_of(place - back, start, prefix_start, prefix_length), mask=going_on)
            going_on = going_on & (found == newest)
            matched += going_on.to(tl.int64)
        top = tl.max(tl.where(matched >= SHORTEST, (matched << PLACE_BITS) + place, 0), axis=0)
        if top > 0:
            tl.atomic_max(best + s, top)


@triton.jit
def draft_kernel(
    ids, starts, lengths, prefix_starts, prefix_lengths, best, tokens, counts,
    DRAFTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (document): what stands at its best place."""
    s = tl.program_id(0).to(tl.int64)
    found = tl.load(best + s)
    start = tl.load(starts + s)
    prefix_start = tl.zeros_like(start)
    prefix_length = tl.zeros_like(start)
    if prefix_starts is not None:
        prefix_start = tl.load(prefix_starts + s)
        prefix_length = tl.load(prefix_lengths + s)
    place = found - ((found >> PLACE_BITS) << PLACE_BITS)
    following = tl.maximum(tl.load(lengths + s) - place, 1)
    draft = tl.arange(0, WIDTH)
    wanted = draft < DRAFTS
    position = place + draft % following
    token = tl.load(ids + slot_of(position, start, prefix_start, prefix_length), mask=wanted & (found > 0), other=0)
    tl.store(tokens + s * DRAFTS + draft, token.to(tl.int64), mask=wanted)
    tl.store(counts + s, tl.where(found > 0, DRAFTS, 0).to(tl.int64))


def find_drafts(
    ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    drafts: int,
    max_length: int,
    prefix_starts: Tensor | None,
    prefix_lengths: Tensor | None,
    longest: int,
    shortest: int,
) -> tuple[Tensor, Tensor]:
    """See kernels.prompt_lookup."""
    S = starts.shape[0]
    best = torch.zeros(S, dtype=torch.int64, device=ids.device)
    tokens = torch.empty(S, drafts, dtype=torch.int64, device=ids.device)
    counts = torch.empty(S, dtype=torch.int64, device=ids.device)
    where = ids, starts, lengths, prefix_starts, prefix_lengths, best
    match_kernel[(ceil_div(max_length, BLOCK), S)](*where, LONGEST=longest, SHORTEST=shortest, BLOCK=BLOCK, num_warps=8)
    draft_kernel[(S,)](*where, tokens, counts, DRAFTS=drafts, WIDTH=power_of_2(drafts), num_warps=1)
    return tokens, counts
