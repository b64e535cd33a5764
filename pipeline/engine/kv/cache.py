"""What transformers' layers see as `past_key_values`: attention calls `update`, linear attention the states' methods,
the masks call the rest.

Duck-typed on purpose: transformers' Cache classes own their tensors, ours writes into the arena and copies no more.
Checked against transformers 5.17 and 5.23.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from pipeline.engine.kv.arena import Arena, Extent, LayerShape
from pipeline.engine.kv.states import CONV, RECURRENT, StateKey, StateShape, StateSlots, extended
from stem_core.context import Copies


class UnsupportedCacheError(AttributeError):
    """The model asks its cache for something that the engine does not keep.

    An AttributeError, so that a model's hasattr() still gets its answer.
    """


def _not_kept(name: str) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"the model uses its cache's {name!r}, which the engine does not provide: only models can run whose whole "
        "state is keys and values of attention layers, and what transformers' LinearAttentionLayer keeps"
    )


@dataclass(frozen=True)
class _Layers:
    """layers[i].conv_states[j], layers[i].recurrent_states[j] of a cache, and layers[i].record_past; nothing else."""

    cache: EngineCache

    def __getitem__(self, layer: int) -> _Layer:
        return _Layer(
            record_past=self.cache.is_recording_past(layer),
            conv_states=_States(partial(self.cache.get_conv_state, layer)),
            recurrent_states=_States(partial(self.cache.get_recurrent_state, layer)),
        )


class _Layer(SimpleNamespace):
    def __getattr__(self, name: str) -> NoReturn:
        raise _not_kept(f"layers[].{name}")


@dataclass(frozen=True)
class _States:
    read: Callable[[int], Tensor | None]

    def __getitem__(self, number: int) -> Tensor | None:
        return self.read(number)


class EngineCache:
    """The part that prefill, decode and the shape probe have in common. slots: of the arena's states, if it has any."""

    is_compileable = False

    def __init__(self, seen: int, slots: StateSlots | None = None) -> None:
        self.seen = seen
        self._slots = slots

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
        raise _not_kept(name)

    @property
    def layers(self) -> _Layers:
        """By layer, its states, as linear attention of transformers 5.17 reads them; later ones call get_conv_state()
        and the like."""
        return _Layers(self)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    # -- linear attention: what a layer gets it may change in place, instead of calling an update

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Whether states can be taken back (for speculative decoding)."""
        return False

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Whether tokens were read before this call of the model."""
        return self.seen > 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The convolution's last inputs [N, C, kernel size]; None before a document's first token."""
        return self._state(StateKey(CONV, layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The recurrent state [N, ...]; None before a document's first token."""
        return self._state(StateKey(RECURRENT, layer_idx, state_idx))

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Take a convolution's inputs [N, C, L]. Returns them with those kept in front (see extended())."""
        place = self._place(StateKey(CONV, layer_idx, state_idx))
        full = extended(self.get_conv_state(layer_idx, state_idx), inputs, place.shape[-1])
        place.copy_(full[..., full.shape[-1] - place.shape[-1] :])
        return full

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take a recurrent state [N, ...]. Returns it."""
        self._place(StateKey(RECURRENT, layer_idx, state_idx)).copy_(state)
        return state

    def _state(self, key: StateKey) -> Tensor | None:
        """What a layer reads, [N, ...]."""
        return self._place(key) if self.has_previous_state() and self._keeps(key) else None

    def _keeps(self, key: StateKey) -> bool:
        return self._slots is not None and key in self._slots.states

    def _kept(self, key: StateKey) -> Tensor:
        """A state of all slots, [slots, ...]."""
        assert self._slots is not None, "a layer keeps a state that the probe did not see"
        return self._slots.states[key]

    def _place(self, key: StateKey) -> Tensor:
        """What a layer writes, [N, ...]."""
        raise NotImplementedError


class ProbeCache(EngineCache):
    """Records what each layer would cache or keep, and where; keeps nothing. keys: what each attention is given."""

    def __init__(self) -> None:
        super().__init__(seen=0)
        self.shapes: dict[int, LayerShape] = {}
        self.states: dict[StateKey, StateShape] = {}
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

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """inputs [1, C, L], unchanged. A model that names no kernel size has padded them to it."""
        size = inputs.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._note(StateKey(CONV, layer_idx, state_idx), (inputs.shape[1], size), inputs)
        return inputs

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """state [1, ...], unchanged."""
        self._note(StateKey(RECURRENT, layer_idx, state_idx), tuple(state.shape[1:]), state)
        return state

    def _note(self, key: StateKey, shape: tuple[int, ...], like: Tensor) -> None:
        self.states[key] = StateShape(shape, like.dtype)
        self.devices[key.layer] = like.device


class PrefillCache(EngineCache):
    """One chunk of one document: tokens [seen, seen + L) of its extent. Its layers change the states where they lie."""

    def __init__(self, arena: Arena, extent: Extent, seen: int, tokens: int) -> None:
        super().__init__(seen, arena.states)
        self._arena = arena
        self._extent = extent
        self._slot = 0 if arena.states is None else arena.states.enter(extent.start, seen, seen + tokens)

    def _place(self, key: StateKey) -> Tensor:
        return self._kept(key)[self._slot : self._slot + 1]

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write k, v [1, Hkv, L, D] in place; return what the attention is given (Arena.write)."""
        return self._arena.write(layer_idx, k, v, self._extent, self.seen)


class TailCache(PrefillCache):
    """A chunk of what stands behind a prefix that lies elsewhere: tokens [seen, seen + L) of its own extent.

    prefix_tokens: of the prefix; the model counts them as seen.
    """

    def __init__(self, arena: Arena, extent: Extent, prefix_tokens: int, seen: int, tokens: int) -> None:
        super().__init__(arena, extent, prefix_tokens + seen, tokens)
        self._own = seen

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write k, v [1, Hkv, L, D] in place; return what the attention is given (Arena.whole)."""
        self._arena.write(layer_idx, k, v, self._extent, self._own)
        return self._arena.whole(layer_idx, k, v)


class DecodeCache(EngineCache):
    """L tokens for each of S rows of a decode batch, written at arena indices slots int64 [S * L].

    states: int64 [S], slots of the rows' states; None for a model without. A layer works on copies of them, which are
    written back when the next layer asks for its own, and by finish().
    """

    def __init__(self, arena: Arena, slots: Tensor, states: Tensor | None = None) -> None:
        super().__init__(0, arena.states)
        self._arena = arena
        self._written = Copies(slots)
        self._rows = None if states is None else Copies(states)
        self._copies: dict[StateKey, Tensor] = {}

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """A prompt was read."""
        return True

    def finish(self) -> None:
        """Write back what the last layer was given. Waits for nothing."""
        for key, copied in self._copies.items():
            self._kept(key).index_copy_(0, self._at(copied.device), copied)
        self._copies = {}

    def _place(self, key: StateKey) -> Tensor:
        if key not in self._copies:
            if any(other.layer != key.layer for other in self._copies):
                self.finish()
            kept = self._kept(key)
            self._copies[key] = kept.index_select(0, self._at(kept.device))
        return self._copies[key]

    def _at(self, device: torch.device) -> Tensor:
        assert self._rows is not None
        return self._rows.on(device)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write k, v [S, Hkv, L, D] in place; return what the attention is given (Arena.append)."""
        return self._arena.append(layer_idx, k, v, self._written.on(k.device))
