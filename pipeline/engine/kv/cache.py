"""What transformers' attention layers see as `past_key_values`: they call `update`, the masks call the rest.

Duck-typed on purpose: transformers' Cache classes own their tensors, ours writes into the arena and copies no more.
Checked against transformers 5.17 and 5.23.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

import torch
from torch import Tensor

from pipeline.engine.kv.arena import Arena, Extent, LayerShape
from stem_core.context import Copies


class UnsupportedCacheError(AttributeError):
    """The model asks its cache for something that the engine does not keep (recurrent state, say).

    An AttributeError, so that a model's hasattr() still gets its answer.
    """


class EngineCache:
    """The part that prefill, decode and the shape probe have in common."""

    is_compileable = False

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached before this call of the model."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first query."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys, offset of the first key)."""
        return self.seen + query_length, 0

    def __getattr__(self, name: str) -> NoReturn:
        # Only reached for names that are not there.
        raise UnsupportedCacheError(
            f"the model uses its cache's {name!r}, which the engine does not provide: only models whose whole state is "
            "keys and values of attention layers can run"
        )

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class ProbeCache(EngineCache):
    """Records what each layer would cache and where. keys: what each layer's attention is given."""

    def __init__(self) -> None:
        super().__init__(seen=0)
        self.shapes: dict[int, LayerShape] = {}
        self.updates: Counter[int] = Counter()
        self.devices: dict[int, torch.device] = {}
        self.keys: dict[int, Tensor] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """k [1, Hkv, L, D], v [1, Hkv, L, Dv], unchanged."""
        self.updates[layer_idx] += 1
        self.shapes[layer_idx] = LayerShape(k.shape[1], k.shape[3], v.shape[3])
        self.devices[layer_idx] = k.device
        self.keys[layer_idx] = k
        return k, v


class PrefillCache(EngineCache):
    """One chunk of one document: tokens [seen, seen + L) of its extent."""

    def __init__(self, arena: Arena, extent: Extent, seen: int) -> None:
        super().__init__(seen)
        self._arena = arena
        self._extent = extent

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write k, v [1, Hkv, L, D] in place; return what the attention is given (Arena.write)."""
        return self._arena.write(layer_idx, k, v, self._extent, self.seen)


class DecodeCache(EngineCache):
    """One token for each row of a decode batch, written at arena index slots[s]."""

    def __init__(self, arena: Arena, slots: Tensor) -> None:
        super().__init__(seen=0)
        self._arena = arena
        self._slots = Copies(slots)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write k, v [S, Hkv, 1, D] in place; return what the attention is given (Arena.append)."""
        return self._arena.append(layer_idx, k, v, self._slots.on(k.device))
