"""The KV arena: one preallocated tensor pair per layer, handed out in contiguous extents, one per document.

Offline lengths are bounded before a document starts (prompt + max_new_tokens), so nothing is paged and nothing grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8_heads import FP8, append_kv, write_kv
from pipeline.engine.devices import tensor_bytes
from pipeline.engine.kv.states import StateSlots
from stem_core.context import QuantizedKV
from stem_core.kv_scales import LayerScales

# Extents start at multiples of this many tokens, so that a kernel's tiles of keys stay aligned, and the groups of 16
# keys in which the values of an fp8 arena are permuted.
ALIGNMENT = 64
# Of a token's id, which lies beside its keys and values for prompt lookup (kernels.prompt_lookup).
ID_BYTES = 4


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
        """Tokens in all free extents together. Any thread may ask."""
        return sum(extent.tokens for extent in tuple(self._free))

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


class Arena:
    """Keys and values of all layers i in the model's dtype: k[i] [Hkv, T, D], v[i] [Hkv, T, Dv].

    T = capacity + ALIGNMENT; the last ALIGNMENT tokens belong to no extent: unused rows of a decode batch write there
    (`scratch`). devices: of each layer. ids: int32 [T], the tokens whose keys and values lie there, written with them.
    device: of `ids`; None: that of the first layer.
    states: of the layers that keep a state instead of keys and values; None for a model without.
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        tokens: int,
        dtype: torch.dtype,
        devices: Mapping[int, torch.device],
        device: torch.device | None = None,
    ) -> None:
        self.extents = ExtentAllocator(tokens)
        self.states: StateSlots | None = None
        self._devices = devices
        self._rows = self.capacity + ALIGNMENT
        device = next(iter(devices.values()), None) if device is None else device
        self.ids = torch.zeros(self._rows, dtype=torch.int32, device=device)
        self.k = {
            i: self._allocate(i, shape.kv_heads, self._rows, shape.head_dim, dtype=dtype) for i, shape in shapes.items()
        }
        self.v = {
            i: self._allocate(i, shape.kv_heads, self._rows, shape.value_dim, dtype=dtype)
            for i, shape in shapes.items()
        }

    def _allocate(self, layer: int, *shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype, device=self._devices[layer])
        # A GPU kernel may load past a document's end before it masks, and 0 * NaN is NaN. On a CPU nothing reads
        # there, and memory that is not touched costs nothing.
        return tensor.zero_() if tensor.is_cuda else tensor

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
        """Bytes of all layers, without `ids`."""
        return tensor_bytes(self._everything())

    def nbytes_on(self, device: torch.device) -> int:
        """Bytes of the layers on a device."""
        return tensor_bytes(self._everything(), device)

    def _everything(self) -> list[Tensor]:
        return [*self.tensors(), *([] if self.states is None else self.states.states.values())]

    def release(self, extent: Extent) -> None:
        """Give an allocated extent back, and the slot of its states."""
        self.extents.release(extent)
        self.forget(extent)

    def forget(self, extent: Extent) -> None:
        """Give back the slot of an extent's states alone."""
        if self.states is not None:
            self.states.release(extent.start)

    def tensors(self) -> list[Tensor]:
        """All keys and values that were allocated."""
        return [*self.k.values(), *self.v.values()]

    def write(self, layer: int, k: Tensor, v: Tensor, extent: Extent, seen: int) -> tuple[Tensor, Tensor]:
        """Put a chunk's keys and values k, v [1, Hkv, L, D] behind the `seen` tokens of its document.

        Returns what the model's attention is to be given: views of the document so far, [1, Hkv, seen + L, D].
        """
        first = extent.start
        begin, end = first + seen, first + seen + k.shape[2]
        arena_k, arena_v = self.k[layer], self.v[layer]
        arena_k[:, begin:end] = k[0]
        arena_v[:, begin:end] = v[0]
        return arena_k[None, :, first:end], arena_v[None, :, first:end]

    def whole(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's attention is to be given where its rows lie in different extents.

        The whole arena of the layer, [1, Hkv, T, D]; k and v, which were written there, if attention reads them in fp8.
        """
        return self.k[layer][None], self.v[layer][None]

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Put L tokens of each of S documents, k, v [S, Hkv, L, D], at arena indices slots int64 [S * L].

        Returns what the model's attention is to be given (whole()). Waits for nothing.
        """
        self.k[layer].index_copy_(1, slots, _by_token(k).transpose(0, 1))
        self.v[layer].index_copy_(1, slots, _by_token(v).transpose(0, 1))
        return self.whole(layer, k, v)

    def quantized(self, extent: Extent | None = None) -> Mapping[int, QuantizedKV]:
        """Of the layers that are in fp8, the keys and values of an extent, or of the whole arena."""
        return {}

    def fill(self, extent: Extent) -> None:
        """Random keys and values in an extent, for measuring."""
        for tensor in self.tensors():
            tensor[:, extent.start : extent.start + extent.tokens].normal_()


class Fp8Arena(Arena):
    """Keys k[i] [Hkv, T, D], transposed values vt[i] [Hkv, D, T] of layers i in e4m3 (see kernels.fp8_heads).

    scales: by layer; None for a wide one, which lies as in Arena, in `dtype`. What is written to the others is what
    their attention reads (`quantized`); the model gets its own k and v back.
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        tokens: int,
        scales: LayerScales,
        dtype: torch.dtype,
        devices: Mapping[int, torch.device],
        device: torch.device | None = None,
    ) -> None:
        self.scales = {i: scales[i] for i in shapes}
        super().__init__({i: shape for i, shape in shapes.items() if scales[i] is None}, tokens, dtype, devices, device)
        self.vt: dict[int, Tensor] = {}
        self._whole: dict[int, QuantizedKV] = {}
        for i, heads in self.scales.items():
            if heads is not None:
                shape = shapes[i]
                self.k[i] = self._allocate(i, shape.kv_heads, self._rows, shape.head_dim, dtype=FP8)
                self.vt[i] = self._allocate(i, shape.kv_heads, shape.head_dim, self._rows, dtype=FP8)
                self._whole[i] = QuantizedKV(self.k[i], self.vt[i], heads)

    def tensors(self) -> list[Tensor]:
        """All that was allocated."""
        return [*super().tensors(), *self.vt.values()]

    def write(self, layer: int, k: Tensor, v: Tensor, extent: Extent, seen: int) -> tuple[Tensor, Tensor]:
        """See Arena. Returns k and v, for a wide layer the document so far."""
        scales = self.scales[layer]
        if scales is None:
            return super().write(layer, k, v, extent, seen)
        write_kv(k, v, scales, self.k[layer], self.vt[layer], extent.start + seen)
        return k, v

    def whole(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See Arena."""
        return super().whole(layer, k, v) if self.scales[layer] is None else (k, v)

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See Arena."""
        scales = self.scales[layer]
        if scales is None:
            return super().append(layer, k, v, slots)
        append_kv(_by_token(k), _by_token(v), scales, self.k[layer], self.vt[layer], slots, run=k.shape[2])
        return k, v

    def quantized(self, extent: Extent | None = None) -> Mapping[int, QuantizedKV]:
        """See Arena. An extent is rounded up to whole units of ALIGNMENT."""
        if extent is None:
            return self._whole
        part = slice(extent.start, extent.start + aligned(extent.tokens))
        return {i: QuantizedKV(kv.k[:, part], kv.vt[..., part], kv.scales) for i, kv in self._whole.items()}

    def fill(self, extent: Extent) -> None:
        """See Arena; the same in all heads."""
        part = slice(extent.start, extent.start + extent.tokens)
        for tensor in (*self.k.values(), *self.v.values(), *(vt.mT for vt in self.vt.values())):
            values = torch.randn(extent.tokens, tensor.shape[-1], device=tensor.device).to(tensor.dtype)
            for head in tensor:
                head[part] = values


def _by_token(x: Tensor) -> Tensor:
    """[S, Hkv, L, D] -> [S * L, Hkv, D]."""
    return x.transpose(1, 2).flatten(0, 1)
