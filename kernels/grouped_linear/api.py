"""Products of fp8 rows with the weights of the expert that each of them goes to, as mixtures of experts need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._common.fp8 import FP8
from kernels._common.rows import QuantizedRows, choose_row_kernel
from kernels.dispatch import implementation, on_its_gpu

# What the tensor cores ask of inputs and outputs.
ALIGNMENT = 16
# Rows of a tile, by the mean number of rows that an expert has.
SMALL, MIDDLE, LARGE = 16, 64, 128


@dataclass(frozen=True)
class Groups:
    """Which expert each row goes to, and the rows in tiles of one expert each.

    ids: [R], 0 <= id < experts. order: int32 [R], row numbers, those of an expert next to one another.
    tile_rows: rows of a tile at most. tile_expert, tile_first, tile_end: int32 [tiles]; a tile holds the rows
    order[first:end], at most tile_rows of them; one with first >= end holds none.
    """

    ids: Tensor
    experts: int
    order: Tensor
    tile_rows: int
    tile_expert: Tensor
    tile_first: Tensor
    tile_end: Tensor


@on_its_gpu
def group_rows(ids: Tensor, experts: int) -> Groups:
    """Sort rows by their expert and cut them into tiles, without reading anything on the host.

    ids: integers of any shape, flattened to [R]; each from 0 to experts - 1, which is not checked.
    Raises ValueError for ids that are no integers.
    """
    if ids.is_floating_point() or experts < 1:
        raise ValueError(f"group_rows takes integer ids of at least one expert, got {ids.dtype} of {experts} experts")
    ids = ids.reshape(-1)
    rows, device = ids.numel(), ids.device
    if rows <= experts:
        # Most experts have one row at most: to find the few that share one costs more than to read its weights twice,
        # the second time from the cache.
        first = torch.arange(rows, dtype=torch.int32, device=device)
        return Groups(ids, experts, first, SMALL, ids.int(), first, first + 1)
    mean = rows // experts
    size = SMALL if mean <= SMALL else MIDDLE if mean <= 2 * MIDDLE else LARGE
    in_order, order = ids.sort()
    ends = torch.searchsorted(in_order, torch.arange(experts, dtype=ids.dtype, device=device), right=True)
    begins = F.pad(ends[:-1], (1, 0))
    tiles = (ends - begins + size - 1) // size
    tile_ends = tiles.cumsum(0)
    # As many as there can be, whatever the ids are.
    tile = torch.arange(rows // size + experts, device=device)
    expert = torch.searchsorted(tile_ends, tile, right=True)
    used = expert < experts
    expert = expert.clamp(max=experts - 1)
    tile_first = begins[expert] + (tile - tile_ends[expert] + tiles[expert]) * size
    tile_end = torch.where(used, ends[expert], 0)
    return Groups(ids, experts, order.int(), size, expert.int(), tile_first.int(), tile_end.int())


@on_its_gpu
def grouped_linear(
    weight: Tensor,
    scale: Tensor,
    rows: QuantizedRows,
    groups: Groups,
    *,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
    fast_accumulation: bool = False,
    impl: str = "auto",
) -> Tensor:
    """out[r] = (rows[r // n] @ weight[e].T + bias[e]) * factors[r], where e is the expert of row r; scales applied.

    weight: float8_e4m3fn [E, N, K], contiguous. scale: float32 [E, N], of each expert's output channels.
    rows: values [M, K], R = n M: one row of them goes to n experts (as tokens do), or to one.
    groups: of R rows and E experts. bias: [E, N] or None. factors: [R] or None. K, N: multiples of 16.
    fast_accumulation: as for `stem_core.fp8.scaled_linear`; otherwise sums go to float32 every 128 products.
    Returns [R, N] in rows.dtype. Raises ValueError for what does not fit, and on GPUs without fp8.
    """
    choice = choose_row_kernel("grouped_linear", weight.device, impl, fp8=True)
    _check(weight, scale, rows, groups, bias, factors)
    return implementation("grouped_linear", choice).grouped_linear(
        weight, scale, rows, groups, bias, factors, fast_accumulation
    )


def _check(
    weight: Tensor, scale: Tensor, rows: QuantizedRows, groups: Groups, bias: Tensor | None, factors: Tensor | None
) -> None:
    if weight.dtype != FP8 or weight.ndim != 3 or not weight.is_contiguous():
        raise ValueError(
            f"grouped_linear: weight must be contiguous float8_e4m3fn [E, N, K], got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    E, N, K = weight.shape
    if N % ALIGNMENT or K % ALIGNMENT:
        raise ValueError(f"grouped_linear: N and K must be multiples of {ALIGNMENT}, got {N} and {K}")
    if groups.experts != E:
        raise ValueError(f"grouped_linear: groups are of {groups.experts} experts, weight of {E}")
    if scale.dtype != torch.float32 or scale.shape != (E, N) or not scale.is_contiguous():
        raise ValueError(
            f"grouped_linear: scale must be contiguous float32 [{E}, {N}], got {scale.dtype} {tuple(scale.shape)}"
        )
    R = groups.ids.numel()
    if rows.values.ndim != 2 or rows.values.shape[1] != K or (len(rows.values) and R % len(rows.values)):
        raise ValueError(
            f"grouped_linear: rows must be [M, {K}] with M dividing the {R} rows of groups, got "
            f"{tuple(rows.values.shape)}"
        )
    for name, tensor, shape in (("bias", bias, (E, N)), ("factors", factors, (R,))):
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(f"grouped_linear: {name} must be contiguous {list(shape)}, got {tuple(tensor.shape)}")
