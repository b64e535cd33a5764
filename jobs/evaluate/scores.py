"""Block scores that an evaluation compares: the product's, and some that no product has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_core.config import StemConfig
from stem_core.estimators import ESTIMATORS, Chunk

# One piece of attention weights in float32 may have this many entries.
MASS_ENTRIES = 1 << 27


@dataclass(frozen=True)
class Place:
    """Where a selection is wanted: the tokens [start, start + Lq) of a prompt of `prompt_length`, in one layer."""

    layer: int
    start: int
    prompt_length: int
    scale: float | None


# (q, k, v, place, config) -> float32 [N, H, rows, n_keys]
Score = Callable[[Tensor, Tensor, Tensor, Place, StemConfig], Tensor]


def window_scores(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """float32 [N, H, rows, n_keys]: the nearer a block, the higher."""
    rows, n_keys = _grid(q, place, config.block_size)
    return torch.arange(n_keys, device=q.device, dtype=torch.float32).expand(*q.shape[:2], rows, n_keys)


def random_scores(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """float32 [N, H, rows, n_keys] in [0, 1), from layer, head, row and column alone: no chunking changes them."""
    rows, n_keys = _grid(q, place, config.block_size)
    first = place.start // config.block_size
    head = torch.arange(q.shape[1], device=q.device)[:, None, None]
    row = torch.arange(first, first + rows, device=q.device)[:, None]
    column = torch.arange(n_keys, device=q.device)
    mixed = ((place.layer * 1009 + head) * 65_537 + row) * 131_101 + column
    for shift, factor in ((33, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85), (32, 1)):  # as in splitmix64
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed & 0xFFFFFF).float().div(1 << 24).expand(*q.shape[:2], rows, n_keys)


def attention_mass(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """The oracle: mean share of attention that each key block gets from the rows of each query block, exactly.

    float32 [N, H, rows, n_keys]. As dear as dense attention itself; a few rows at a time, never N x N.
    """
    N, H, Lq, D = q.shape
    block_size = config.block_size
    rows, n_keys = _grid(q, place, block_size)
    width = n_keys * block_size
    out = torch.zeros(N, H, rows, n_keys, device=q.device)
    step = max(1, MASS_ENTRIES // (N * H * width * block_size))
    for row in range(0, rows, step):
        part = slice(row * block_size, min(Lq, (row + step) * block_size))
        positions = torch.arange(place.start + part.start, place.start + part.stop)
        share = block_shares(q[:, :, part], k, positions, block_size, place.scale)
        missing = -share.shape[2] % block_size
        share = torch.nn.functional.pad(share, (0, 0, 0, missing)).unflatten(2, (-1, block_size)).sum(3)
        out[:, :, row : row + share.shape[2], : share.shape[3]] = share
    return out


def block_shares(q: Tensor, k: Tensor, positions: Tensor, block_size: int, scale: float | None) -> Tensor:
    """Share of attention of each key block, for queries q [N, H, R, D] at `positions` [R], ascending, on the host.

    float32 [N, H, R, blocks up to the last position].
    """
    N, H, R, D = q.shape
    known = int(positions[-1]) + 1
    scale = D**-0.5 if scale is None else scale
    grouped = q.float().mul(scale).reshape(N, k.shape[1], -1, D)
    logits = (grouped @ k[:, :, :known].float().mT).view(N, H, R, known)
    first = int(positions[0])  # keys before the first query are seen by all of them
    later = torch.arange(first, known, device=q.device)
    logits[..., first:].masked_fill_(later > positions.to(q.device)[:, None], -torch.inf)
    share = logits.softmax(-1)
    return torch.nn.functional.pad(share, (0, -known % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def product_scores(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """The scores of the config's estimator, float32 [N, H, rows, n_keys]; -inf above the diagonal."""
    scores = ESTIMATORS[config.estimator].scores(Chunk(q, k, v, place.start, place.scale), config)
    above = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(place.start // config.block_size + 1)
    return scores.masked_fill(above, -torch.inf)


def _grid(q: Tensor, place: Place, block_size: int) -> tuple[int, int]:
    return -(-q.shape[2] // block_size), -(-(place.start + q.shape[2]) // block_size)
