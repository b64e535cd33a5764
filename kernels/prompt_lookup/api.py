"""Draft tokens for documents whose outputs quote them: what followed the newest tokens where they stood before."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.rows import check_rows
from kernels.dispatch import choose_portable, implementation, on_its_gpu

# The longest and the shortest run of newest tokens that is looked for. Measured on extractions and summaries of
# Qwen2.5-Coder-0.5B: with runs down to one token, summaries get 1.6 to 1.7 tokens per step instead of 1.4; longer runs
# than four matter little (extractions: 3.5 instead of 3.4).
LONGEST, SHORTEST = 6, 1


@on_its_gpu
def find_drafts(
    ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    drafts: int,
    max_length: int,
    prefix_starts: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    longest: int = LONGEST,
    shortest: int = SHORTEST,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The tokens that followed the newest ones of each document where these stood before; capturable in a CUDA graph.

    Of every document the longest run of newest tokens, at most `longest` and at least `shortest` of them, that stands
    earlier in it is found, at its latest place; the drafts are what followed there. A place may overlap the newest
    tokens: where the drafts reach the document's end, what follows there begins again, so that a text that repeats
    itself is drafted as going on so.

    ids: int32 [T], token ids by place in the arena. starts: int64 [S]; lengths: int64 [S]: document s is
        ids[starts[s] : starts[s] + lengths[s]], its newest token last; 0 for an unused slot. Other places may hold any
        number.
    drafts: how many tokens a document gets. max_length: a bound on `lengths` known on the host.
    prefix_starts, prefix_lengths: int64 [S], both or neither: the first prefix_lengths[s] tokens of document s lie
        from prefix_starts[s] on, and starts[s] is the place of the one behind them. They are counted in `lengths`.
    Returns tokens int64 [S, drafts], zeros where there are none, and int64 [S], how many of them there are: `drafts`
    or 0. Raises ValueError for shapes or types that do not fit.
    """
    S = starts.shape[0] if starts.ndim == 1 else -1
    if ids.ndim != 1 or ids.dtype != torch.int32 or ids.stride(0) != 1:
        raise ValueError(f"find_drafts: ids must be contiguous int32 [T], got {ids.dtype} {tuple(ids.shape)}")
    given = {"starts": starts, "lengths": lengths, "prefix_starts": prefix_starts, "prefix_lengths": prefix_lengths}
    for name, tensor in given.items():
        if tensor is not None:
            check_rows(f"find_drafts: {name}", tensor, torch.int64, S)
    if (prefix_starts is None) != (prefix_lengths is None):
        raise ValueError("find_drafts takes prefix_starts and prefix_lengths together or not at all")
    if not 1 <= shortest <= longest or drafts < 1 or max_length < 1:
        raise ValueError(
            f"find_drafts: 1 <= shortest <= longest, and drafts and max_length are at least 1, got {shortest}, "
            f"{longest}, {drafts}, {max_length}"
        )
    choice = choose_portable("find_drafts", ids.device, impl)
    return implementation("prompt_lookup", choice).find_drafts(
        ids, starts, lengths, drafts, max_length, prefix_starts, prefix_lengths, longest, shortest
    )
