"""Slots for what layers without a KV cache keep of a document: convolution and recurrent states of linear attention.

A state has one size whatever the document's length. Each live document has one slot, in which all layers keep theirs;
it is known by where the document's extent begins, so that whoever has an extent (a row of the decode batch, a prefix)
has the slot too. Decode steps look slots up on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CONV, RECURRENT = "conv", "recurrent"


class StateKey(NamedTuple):
    """One state of a layer: its kind (CONV or RECURRENT), and its number where a layer has several of a kind."""

    kind: str
    layer: int
    number: int = 0


@dataclass(frozen=True)
class StateShape:
    """One state of one document. shape: a convolution's last inputs [channels, kernel size], or a recurrent state, as
    the model's code makes it; dtype: of that, too (most keep recurrent states in float32 in every precision).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one document's state."""
        return prod(self.shape) * self.dtype.itemsize


StateShapes = Mapping[StateKey, StateShape]


def slots_for(documents: int) -> int:
    """Slots that are allocated for `documents` documents: one more for a prefix that they share, and one where the idle
    rows of a decode batch write.
    """
    return documents + 2


class StateSlots:
    """States of up to `documents` documents and a prefix of theirs, by StateKey: [documents + 2, ...], the last slot
    being the idle rows'.

    units: how many places an extent can begin at, `alignment` tokens apart; one more is the arena's scratch token.
    devices: by layer. device: of the decode batch. What a slot held before is never read: the first chunk of a document
    is run without a state, and writes all of it.
    """

    def __init__(
        self,
        shapes: StateShapes,
        documents: int,
        units: int,
        alignment: int,
        devices: Mapping[int, torch.device],
        device: torch.device,
    ) -> None:
        self._idle = slots_for(documents) - 1
        self.states = {
            key: torch.zeros(slots_for(documents), *shape.shape, dtype=shape.dtype, device=devices[key.layer])
            for key, shape in shapes.items()
        }
        self._alignment = alignment
        self._table = torch.full((units + 1,), self._idle, dtype=torch.int64, device=device)
        self._slots: dict[int, int] = {}  # by the extent's start
        self._free = list(range(self._idle))[::-1]
        self._read: dict[int, int] = {}  # by the extent's start: tokens that the states are behind

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def has(self, start: int) -> bool:
        """Whether the extent that begins at `start` has a slot."""
        return start in self._slots

    def enter(self, start: int, seen: int, end: int) -> int:
        """The slot of the document whose extent begins at `start`, of which tokens [seen, end) are about to be read.

        Raises ValueError if its states are not those behind `seen` tokens, RuntimeError if no slot is free.
        """
        slot = self._slots.get(start)
        if slot is None:
            slot = self._claim(start)
        elif seen and self._read[start] != seen:
            raise ValueError(
                f"the recurrent states of this extent are those behind {self._read[start]:,} tokens, and a chunk "
                f"behind {seen:,} was to be read: states cannot go back; read the prompt from its beginning"
            )
        self._read[start] = end
        return slot

    def release(self, start: int) -> None:
        """Give back the slot of the extent that begins at `start`, if it has one."""
        slot = self._slots.pop(start, None)
        if slot is not None:
            self._table[start // self._alignment] = self._idle
            self._free.append(slot)
            del self._read[start]

    def copy(self, source: int, target: int) -> None:
        """The states of one extent's document, which must have some, to another's; both are named by their starts."""
        read = self._read[source]
        from_slot, to_slot = self._slots[source], self.enter(target, 0, read)
        for state in self.states.values():
            state[to_slot] = state[from_slot]

    def saved(self, start: int) -> dict[StateKey, Tensor]:
        """A copy of the states of the document whose extent begins at `start`, for write()."""
        slot = self._slots[start]
        return {key: state[slot].clone() for key, state in self.states.items()}

    def write(self, start: int, saved: Mapping[StateKey, Tensor]) -> None:
        """Put back what saved() gave, into the slot of the document whose extent begins at `start`."""
        slot = self._slots[start]
        for key, state in self.states.items():
            state[slot] = saved[key]

    def rows(self, starts: Tensor, lengths: Tensor) -> Tensor:
        """Slots int64 [S] of the rows of a decode batch; idle ones (length 0) have the last. Waits for nothing."""
        return self._table[starts // self._alignment].masked_fill(lengths == 0, self._idle)

    def _claim(self, start: int) -> int:
        if not self._free:
            raise RuntimeError(f"all {self._idle} slots for recurrent states are taken: release an extent first")
        slot = self._slots[start] = self._free.pop()
        self._table[start // self._alignment] = slot
        return slot


def extended(state: Tensor | None, inputs: Tensor, size: int) -> Tensor:
    """A convolution's inputs [N, C, L] behind those it keeps, [N, C, size + L]; the last `size` are its next state.

    state: [N, C, size]; None at a document's beginning, where zeros stand in front as far as `size` needs them.
    """
    if state is None:
        return pad(inputs, (max(0, size - inputs.shape[-1]), 0))
    return torch.cat([state, inputs.to(state.dtype)], dim=-1)
