"""What the operations that score blocks share: what they demand of their inputs, and where scores are written."""

from __future__ import annotations

import torch
from torch import Tensor


def check_inputs(q: Tensor, k: Tensor, query_start: int, block_size: int, key_start: int = 0) -> None:
    """Raise ValueError unless q [N, H, Lq, D] and k [N, Hkv, Lk, D] go together, and the keys cover the queries."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q must be [N, H, Lq, D] and k [N, Hkv, Lk, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k {tuple(k.shape)} does not go with q {tuple(q.shape)}: batch and D equal, H a multiple of Hkv"
        )
    if not q.is_floating_point():
        raise ValueError(f"q must have a floating-point type, got {q.dtype}")
    end = query_start + q.shape[2]
    if q.shape[2] < 1 or query_start < key_start or query_start % block_size or key_start + k.shape[2] < end:
        raise ValueError(
            f"queries [{query_start}, {end}) must start at a multiple of block_size={block_size} and lie inside the "
            f"{k.shape[2]} keys" + (f" from {key_start} on" if key_start else "")
        )


def check_cache(name: str, blocks: int | None, query_start: int, block_size: int, key_start: int) -> None:
    """Raise ValueError unless what is kept of earlier chunks' keys goes on to this chunk.

    name: the argument's. blocks: complete blocks that it holds; None where there is none.
    """
    if key_start < 0 or key_start % block_size or key_start > (blocks or 0) * block_size:
        raise ValueError(
            f"key_start must be a multiple of block_size={block_size} up to which {name} holds the keys, got "
            f"{key_start} and {'none' if blocks is None else f'{blocks} blocks'}"
        )
    if blocks is not None and blocks < query_start // block_size:
        raise ValueError(
            f"{name} holds {blocks} blocks, but this chunk starts at block {query_start // block_size}: "
            "pass the chunks of a prompt in order"
        )


def empty_scores(N: int, H: int, rows: int, n_keys: int, device: torch.device) -> Tensor:
    """[N, H, rows, n_keys] with rows 16 scores apart or a multiple of it: kernels are compiled once for such strides,
    and not again for other prompt lengths."""
    return torch.empty(N, H, rows, -(-n_keys // 16) * 16, dtype=torch.float32, device=device)[..., :n_keys]
