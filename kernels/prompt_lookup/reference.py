"""Prompt lookup in plain torch: the specification, and what runs on a CPU.

After prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), which takes the first place
of the longest run; here it is the latest, and drafts go on past the document's end.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """See kernels.prompt_lookup. `max_length` is not needed here: lengths are read on the host."""
    S = starts.shape[0]
    tokens = torch.zeros(S, drafts, dtype=torch.int64, device=ids.device)
    counts = torch.zeros(S, dtype=torch.int64, device=ids.device)
    before_starts = [0] * S if prefix_starts is None else prefix_starts.tolist()
    before_lengths = [0] * S if prefix_lengths is None else prefix_lengths.tolist()
    rows = zip(starts.tolist(), lengths.tolist(), before_starts, before_lengths, strict=True)
    for s, (start, length, prefix_start, prefix) in enumerate(rows):
        if length <= shortest:
            continue
        text = ids[start : start + length - prefix]
        if prefix:
            text = torch.cat([ids[prefix_start : prefix_start + prefix], text])
        # matched[e]: how many of the newest tokens stand right before place e.
        matched = torch.zeros(length, dtype=torch.int64, device=ids.device)
        going_on = torch.ones(length, dtype=torch.bool, device=ids.device)
        for back in range(1, min(longest, length - 1) + 1):
            going_on[:back] = False
            going_on[back:] &= text[: length - back] == text[length - back]
            matched += going_on
        most = int(matched.max())
        if most < shortest:
            continue
        place = int((matched == most).nonzero()[-1])
        following = torch.arange(drafts, device=ids.device) % (length - place)
        tokens[s] = text[place + following]
        counts[s] = drafts
    return tokens, counts
