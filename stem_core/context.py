"""What the engine tells the attention of every layer, handed through `model(..., stem_context=...)`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels.block_scores import KeySummary


@dataclass
class PrefillContext:
    """One document's prefill; the engine moves `start` from chunk to chunk.

    start: absolute position of the chunk's first token, a multiple of the block size.
    prompt_length: tokens in the whole prompt; budgets are keyed on it, so that chunking changes nothing.
    summaries: key side of the block scores by layer, filled by the attention.
    windows: sliding window by layer, None for none, as the model hands it to the attention, which notes it here.
    """

    prompt_length: int
    start: int = 0
    summaries: dict[int, KeySummary] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)


@dataclass
class DecodeContext:
    """One decode step of all live documents; query s belongs to document s.

    starts: int64 [S], first arena row of each document. lengths: int32 [S], tokens it holds, the new one included; 0
    for an unused slot. max_length: a bound on `lengths` that is known on the host.
    The model's cache returns the whole arenas [1, Hkv, T, D] from `update`.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int


StemContext = PrefillContext | DecodeContext
