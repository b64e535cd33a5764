"""What the engine tells the attention of every layer, handed through `model(..., stem_context=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection
from kernels.decode_attention import Prefixes
from kernels.fp8_heads import HeadScales
from stem_core.estimators import KeyState
from stem_core.output_error import ErrorProbe


class Copies:
    """A tensor and its copies on other devices, each made when it is first asked for. Nothing waits for the host.

    A copy is made from the newest one: where layers are spread over devices in order, that is the neighbour's. Torch
    lets the stream of the device that is copied from wait for the other's: one further back would wait for all between.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._by_device = {tensor.device: tensor}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on `device`."""
        found = self._by_device.get(device)
        if found is None:
            newest = next(reversed(self._by_device.values()))
            found = self._by_device[device] = newest.to(device, non_blocking=True)
        return found


@dataclass(frozen=True)
class QuantizedKV:
    """Where one layer's keys and values lie in fp8 (kernels.fp8_heads), with the scales of its heads.

    k: float8_e4m3fn [Hkv, T, D]. vt: float8_e4m3fn [Hkv, D, T], 16 dividing T; values transposed, keys permuted.
    bias: float8_e4m3fn [Hkv, P, T, 16], what the mean query adds to the keys' scores (kernels.fp8_heads.key_bias), in
        the prefill of a layer whose scales have a q_mean; else None.
    In a prefill token t of the document is row t; in a decode step T is the whole arena.
    """

    k: Tensor
    vt: Tensor
    scales: HeadScales
    bias: Tensor | None = None


# Makes a sparse layer's selection in place of stem_core.selection.stem_selection: (layer, then its arguments).
Select = Callable[..., BlockSelection]


@dataclass
class PrefillContext:
    """One document's prefill; the engine moves `start` from chunk to chunk.

    start: absolute position of the chunk's first token, a multiple of the block size.
    prompt_length: tokens in the whole prompt; budgets are keyed on it, so that chunking changes nothing.
    keys: what the estimator keeps of earlier chunks' keys, by layer, filled by the attention.
    windows, queries: by layer, the sliding window, None for none, and how many queries the model hands to the
        attention, which notes them here. Some models need the last query alone in layers without keys of their own.
    attention_keys: by layer, the keys that the attention gets, noted for who wants to know whose they are; None: not
        noted.
    quantized: of the layers that are in fp8, the document's keys and values, this chunk's included: their attention
        runs in fp8, and the keys and values that the model hands over are those of the chunk alone.
    bias: of those layers, what the mean query adds to the scores of the document's keys (QuantizedKV.bias), filled by
        the attention.
    last_layer: the attention layer that runs last, if tokens that the prompt goes on behind may end there: their keys
        and values are in the cache by then, and nobody reads what would follow (see PromptGoesOn).
    probe: gets the sparse layers' output errors; None: nothing is measured.
    dense: every layer attends to all that its window lets it see, whatever its policy says.
    select: chooses the blocks of the sparse layers, for those who compare selections or look at them; None: Stem does.
    """

    prompt_length: int
    start: int = 0
    keys: dict[int, KeyState] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    queries: dict[int, int] = field(default_factory=dict)
    attention_keys: dict[int, Tensor] | None = None
    quantized: Mapping[int, QuantizedKV] = field(default_factory=dict)
    bias: dict[int, Tensor] = field(default_factory=dict)
    last_layer: int | None = None
    probe: ErrorProbe | None = None
    dense: bool = False
    select: Select | None = None


class PromptGoesOn(Exception):  # noqa: N818 - nothing went wrong
    """Raised by the attention of PrefillContext.last_layer, in place of a result, when the prompt goes on.

    Only the keys and values of such tokens are needed; the rest of their last layer would be computed for nobody. Whole
    chunks end so, and all blocks but the last of a prompt's last chunk (pipeline.engine.model.last_layer).
    """


@dataclass
class DecodeContext:
    """Rows of query tokens that attend densely, each to its own part of the arena: query s belongs to row s.

    A decode step of all live documents, a row each, or the tokens of one document that stand behind what it shares with
    others (token i of a call is row i then).

    starts: int64 [S], first arena row of each. lengths: int32 [S], tokens there up to the row's own; 0 for an unused
    slot. max_length: a bound on `lengths` that is known on the host.
    The model's cache returns a layer's whole arena [1, Hkv, T, D] from `update`, unless it is in fp8.
    quantized: of the layers that are in fp8, the whole arena, the new tokens included.
    prefixes: keys that rows see before those; None: there are none.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int
    quantized: Mapping[int, QuantizedKV] = field(default_factory=dict)
    prefixes: Prefixes | None = None

    def __post_init__(self) -> None:
        self._starts, self._lengths = Copies(self.starts), Copies(self.lengths)
        if self.prefixes is not None:
            parts = (self.prefixes.starts, self.prefixes.lengths, self.prefixes.members)
            self._prefixes = [Copies(part) for part in parts]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`starts` and `lengths` on a layer's device."""
        return self._starts.on(device), self._lengths.on(device)

    def prefixes_on(self, device: torch.device) -> Prefixes | None:
        """`prefixes` on a layer's device."""
        if self.prefixes is None:
            return None
        starts, lengths, members = (part.on(device) for part in self._prefixes)
        return Prefixes(starts, lengths, members, self.prefixes.max_length)

    def last_row(self) -> DecodeContext:
        """The last row alone, for layers to which a model hands its last token's query only."""
        prefixes = self.prefixes
        if prefixes is not None:
            alone = torch.zeros_like(prefixes.members[:1, :1])
            prefixes = Prefixes(prefixes.starts[-1:], prefixes.lengths[-1:], alone, prefixes.max_length)
        return DecodeContext(self.starts[-1:], self.lengths[-1:], self.max_length, self.quantized, prefixes)


StemContext = PrefillContext | DecodeContext
