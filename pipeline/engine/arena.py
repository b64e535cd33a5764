"""The KV arena: one preallocated tensor pair per layer, handed out in contiguous extents, one per document.

Offline lengths are bounded before a document starts (prompt + max_new_tokens), so nothing is paged and nothing grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Extents start at multiples of this many tokens, so that a kernel's tiles of keys stay aligned.
ALIGNMENT = 64


def aligned(tokens: int) -> int:
    """`tokens` rounded up to whole units of ALIGNMENT."""
    return -(-tokens // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Extent:
    """Arena tokens [start, start + tokens)."""

    start: int
    tokens: int


class ExtentAllocator:
    """First fit over [0, capacity); freed neighbours merge at once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._free = [Extent(0, self.capacity)] if self.capacity else []

    @property
    def free_tokens(self) -> int:
        """Tokens in all free extents together."""
        return sum(extent.tokens for extent in self._free)

    @property
    def largest_free(self) -> int:
        """Tokens in the largest free extent."""
        return max((extent.tokens for extent in self._free), default=0)

    def allocate(self, tokens: int) -> Extent | None:
        """An extent of at least `tokens` tokens, or None if no free extent is that long."""
        if tokens < 1:
            raise ValueError(f"an extent has at least 1 token, got {tokens}")
        size = aligned(tokens)
        for index, extent in enumerate(self._free):
            if extent.tokens >= size:
                rest = Extent(extent.start + size, extent.tokens - size)
                self._free[index : index + 1] = [rest] if rest.tokens else []
                return Extent(extent.start, size)
        return None

    def release(self, extent: Extent) -> None:
        """Give an extent back. Raises ValueError if any of it is free already or outside the arena."""
        end = extent.start + extent.tokens
        if extent.start < 0 or end > self.capacity:
            raise ValueError(f"{extent} lies outside the arena of {self.capacity} tokens")
        if any(free.start < end and extent.start < free.start + free.tokens for free in self._free):
            raise ValueError(f"{extent} is free already")
        merged: list[Extent] = []
        for free in sorted([*self._free, extent], key=lambda item: item.start):
            if merged and merged[-1].start + merged[-1].tokens == free.start:
                merged[-1] = Extent(merged[-1].start, merged[-1].tokens + free.tokens)
            else:
                merged.append(free)
        self._free = merged


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches per token: keys [kv_heads, head_dim], values [kv_heads, value_dim]."""

    kv_heads: int
    head_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values."""
        return self.kv_heads * (self.head_dim + self.value_dim) * dtype.itemsize


class KVArena:
    """Keys and values of all layers i: k[i] [Hkv, T, D], v[i] [Hkv, T, Dv], T = capacity + ALIGNMENT.

    The last ALIGNMENT tokens belong to no extent: unused rows of a decode batch write there (`scratch`).
    """

    def __init__(self, shapes: dict[int, LayerShape], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.extents = ExtentAllocator(tokens)
        self.device = device
        rows = self.extents.capacity + ALIGNMENT

        def allocate(heads: int, dim: int) -> Tensor:
            tensor = torch.empty(heads, rows, dim, dtype=dtype, device=device)
            # A GPU kernel may load past a document's end before it masks, and 0 * NaN is NaN. On a CPU nothing reads
            # there, and memory that is not touched costs nothing.
            return tensor.zero_() if device.type == "cuda" else tensor

        self.k = {layer: allocate(shape.kv_heads, shape.head_dim) for layer, shape in shapes.items()}
        self.v = {layer: allocate(shape.kv_heads, shape.value_dim) for layer, shape in shapes.items()}

    @property
    def capacity(self) -> int:
        """Tokens that extents can be made of."""
        return self.extents.capacity

    @property
    def scratch(self) -> int:
        """Arena index that no extent covers."""
        return self.extents.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(t.nbytes for t in (*self.k.values(), *self.v.values()))
