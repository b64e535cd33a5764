"""Masks of the tokens that may come next in rows whose answers have a schema: from the host's grammar to the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.answers.grammar import MaskFiller, Matcher

BITS = 32


@dataclass(frozen=True)
class Constraint:
    """What may come next in one output. stop_ids: tokens that end it, which may come where it is complete."""

    matcher: Matcher
    stop_ids: tuple[int, ...]


class TokenMasks:
    """Masks of the decode batch's rows, in memory that is allocated once.

    device: int32 [rows, W + 1] on the batch's device, W = ceil(vocabulary / 32): the words of kernels.token_mask, and
    in the last column whether the row is masked. What the next sampling of a row reads, send() writes, in stream order.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        shape = (rows, -(-vocabulary // BITS) + 1)
        on_gpu = device.type == "cuda"
        self.device = torch.zeros(shape, dtype=torch.int32, device=device)
        # Pinned memory that is allocated in a step would wait for the device.
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu)
        self._words = self._host.numpy()
        self._sent = torch.cuda.Event() if on_gpu else None
        self._filler = MaskFiller(rows)
        self._vocabulary = vocabulary

    def send(self, constraints: Mapping[int, Constraint], rows: range) -> None:
        """Compute the masks of `rows`, and copy them behind what the device has to do; those without are not masked."""
        if self._sent is not None:
            self._sent.synchronize()  # the copy before; whoever read a token of its step has waited for it already
        self._words[rows.start : rows.stop, -1] = 0
        self._filler.fill({row: each.matcher for row, each in constraints.items()}, self._words[:, :-1])
        unsigned = self._words.view(np.uint32)
        for row, each in constraints.items():
            self._words[row, -1] = 1
            ends = each.matcher.complete
            for token in each.stop_ids:
                if token < self._vocabulary:
                    bit = np.uint32(1 << token % BITS)
                    word = unsigned[row, token // BITS]
                    unsigned[row, token // BITS] = word | bit if ends else word & ~bit
        self.device[rows.start : rows.stop].copy_(self._host[rows.start : rows.stop], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
