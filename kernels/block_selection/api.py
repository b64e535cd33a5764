"""Which key blocks each query block keeps: budgets and scores in, indices and counts out.

A query block's budget may be each head's, or first be shared among its heads (`share_budgets`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.selection import BlockSelection
from kernels.dispatch import Choice, choose_portable, implementation, on_its_gpu


def tile_order(counts: Tensor, kv_heads: int) -> Tensor:
    """int32 [N, Hkv, GROUP * rows]: the tiles of each KV head, those that keep most blocks first, ties by number.

    A tile is a query block of one of the KV head's GROUP = H / Hkv heads. Tile t is row rows - 1 - t // GROUP of head
    t % GROUP, as the attention kernels count (kernels._common.hopper_gluon.tile_of). No host synchronisation.

    counts: int32 [N, H, rows]. Raises ValueError unless H is a multiple of kv_heads.
    """
    if counts.ndim != 3 or kv_heads < 1 or counts.shape[1] % kv_heads:
        raise ValueError(f"counts must be [N, H, rows], H a multiple of {kv_heads} KV heads, got {tuple(counts.shape)}")
    tiles = counts.unflatten(1, (kv_heads, -1)).flip(-1).transpose(2, 3).flatten(2)
    return tiles.argsort(dim=-1, descending=True, stable=True).int()


def choose_block_selection(device: torch.device, impl: str = "auto") -> Choice:
    """The implementation that `select_blocks` and `share_budgets` use for tensors on `device`."""
    return choose_portable("block_selection", device, impl)


@on_its_gpu
def select_blocks(
    scores: Tensor,
    budgets: Tensor,
    *,
    first_row: int = 0,
    sink_blocks: int = 4,
    local_blocks: int = 4,
    max_blocks: int,
    impl: str = "auto",
) -> BlockSelection:
    """Keep sink, local and diagonal blocks and, from the rest, the highest scores, within each row's budget.

    Row r stands for query block i = first_row + r, whose causal key blocks are 0..i. It keeps exactly
    min(i + 1, max(budget, forced)) blocks, `forced` being its sink, local and diagonal blocks. Among equal scores
    the lower block index wins. A score that is NaN competes for nothing: its block is kept only as one of the forced
    ones or in a row that keeps every block, and a row with too few other scores keeps fewer. No host synchronisation.

    scores:  float32 [N, H, rows, n_keys], n_keys >= first_row + rows; entries above the diagonal are ignored.
    budgets: int32 on the device of `scores`, [rows] for all heads or [N, H, rows] for each.
    max_blocks: width of the result, at least the largest number of blocks that any row keeps; known on the host,
        so that nothing waits for the device.
    Raises ValueError for shapes or types that do not fit.
    """
    N, H, rows = _check(scores, first_row, sink_blocks, local_blocks)
    if budgets.shape not in ((rows,), (N, H, rows)) or budgets.dtype != torch.int32:
        raise ValueError(
            f"budgets must be int32 [{rows}] or [{N}, {H}, {rows}], got {budgets.dtype} {tuple(budgets.shape)}"
        )
    if max_blocks < 1:
        raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
    choice = choose_block_selection(scores.device, impl)
    return implementation("block_selection", choice).select_blocks(
        scores, budgets, first_row, sink_blocks, local_blocks, max_blocks
    )


@on_its_gpu
def share_budgets(
    scores: Tensor,
    budgets: Tensor,
    *,
    first_row: int = 0,
    sink_blocks: int = 4,
    local_blocks: int = 4,
    floor: float,
    cap: float,
    impl: str = "auto",
) -> Tensor:
    """int32 [N, H, rows]: how many blocks each head keeps where the H heads of a row share H * budgets[r] by score.

    Row r stands for query block i = first_row + r. Its forced blocks are those of `select_blocks`, its budget is at
    least as many; a budget that covers all i + 1 causal blocks gives every head all of them. Otherwise, of a head's
    free blocks (causal, not forced),

        keep_h(t) = forced + clamp(number of free blocks that score above t, own, most)
        own  = clamp(ceil(floor * budget) - forced, 0, free)     kept at least
        most = clamp(ceil(cap * budget) - forced, own, free)     kept at most

    and the result is keep_h(t) at the least threshold t >= -inf with sum over h of keep_h(t) <= H * budget. It is the
    same for all heads: a block is worth the same whichever head's it is. Blocks that tie at it are dropped by all
    heads (a row of equal scores keeps `own` only), so the result depends on no order, and on nothing but the row.
    Scores that are NaN or -inf count for nothing. floor * budget and cap * budget are rounded to float32. No host
    synchronisation.

    scores:  float32 [N, H, rows, n_keys] that compare across heads, such as shares of attention; n_keys >= first_row +
        rows, entries above the diagonal are ignored.
    budgets: int32 [rows] on the device of `scores`, blocks per head on average.
    floor, cap: least and most that a head keeps, as shares of its row's budget, 0 <= floor <= 1 <= cap.
    Raises ValueError for shapes, types or values that do not fit.
    """
    rows = _check(scores, first_row, sink_blocks, local_blocks)[2]
    if budgets.shape != (rows,) or budgets.dtype != torch.int32:
        raise ValueError(f"budgets must be int32 [{rows}], got {budgets.dtype} {tuple(budgets.shape)}")
    if not 0.0 <= floor <= 1.0 <= cap:
        raise ValueError(f"0 <= floor <= 1 <= cap is needed, got floor={floor}, cap={cap}")
    choice = choose_block_selection(scores.device, impl)
    if choice.impl == "triton":
        from kernels.block_selection import triton_share as implementation
    else:
        from kernels.block_selection import reference as implementation  # type: ignore[no-redef]
    return implementation.share_budgets(scores, budgets, first_row, sink_blocks, local_blocks, floor, cap)


def _check(scores: Tensor, first_row: int, sink_blocks: int, local_blocks: int) -> tuple[int, int, int]:
    """N, H and rows; raises ValueError for what no operation takes."""
    if scores.ndim != 4 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 [N, H, rows, n_keys], got {scores.dtype} {tuple(scores.shape)}")
    N, H, rows, n_keys = scores.shape
    if first_row < 0 or n_keys < first_row + rows:
        raise ValueError(f"{rows} rows from {first_row} need at least {first_row + rows} key blocks, got {n_keys}")
    if sink_blocks < 0 or local_blocks < 1:
        raise ValueError(f"sink_blocks >= 0 and local_blocks >= 1 are needed, got {sink_blocks}, {local_blocks}")
    return N, H, rows
