"""Masks of the tokens that may come next in rows whose answers have a schema: from the host's grammar to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    places: of a row that can be masked in one step: 1, and as many more as it may verify drafts.
    device: int32 [rows * places, W + 1] on the batch's device, W = ceil(vocabulary / 32): the words of
    kernels.token_mask, and in the last column whether the place is masked. What the next sampling of a row reads,
    send() writes, in stream order: in a step of P places, row r's are lines r * P to r * P + P - 1.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device, places: int = 1) -> None:
        shape = (rows * places, -(-vocabulary // BITS) + 1)
        on_gpu = device.type == "cuda"
        self.device = torch.zeros(shape, dtype=torch.int32, device=device)
        # Pinned memory that is allocated in a step would wait for the device.
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu)
        self._words = self._host.numpy()
        self._sent = torch.cuda.Event() if on_gpu else None
        self._filler = MaskFiller(rows)
        self._vocabulary = vocabulary

    def send(
        self, constraints: Mapping[int, Constraint], rows: range, drafts: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Compute the masks of `rows`, and copy them behind what the device has to do; those without are not masked.

        drafts: by row of `rows`, all as long, negative behind a row's last one: the step verifies them, and the place
        behind each has a mask as long as the drafts before it may come. What comes behind others is dropped.
        """
        if self._sent is not None:
            self._sent.synchronize()  # the copy before; whoever read a token of its step has waited for it already
        places = 1 + (len(drafts[0]) if drafts else 0)
        lines = slice(rows.start * places, rows.stop * places)
        self._words[lines, -1] = 0
        reached, taken = dict(constraints), dict.fromkeys(constraints, 0)
        for place in range(places):
            self._fill({row * places + place: each for row, each in reached.items()})
            if not drafts or place == places - 1:
                break
            for row, each in list(reached.items()):
                token = drafts[row - rows.start][place]
                if token in each.stop_ids or not self._may_come(token, row * places + place):
                    del reached[row]
                    continue
                each.matcher.take(token)
                taken[row] += 1
                if each.matcher.done:
                    del reached[row]
        for row, count in taken.items():
            if count:
                constraints[row].matcher.go_back(count)
        self.device[lines].copy_(self._host[lines], non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _fill(self, constraints: Mapping[int, Constraint]) -> None:
        """Write what may come next by these constraints, by line."""
        self._filler.fill({line: each.matcher for line, each in constraints.items()}, self._words[:, :-1])
        unsigned = self._words.view(np.uint32)
        for line, each in constraints.items():
            self._words[line, -1] = 1
            ends = each.matcher.complete
            for token in each.stop_ids:
                if token < self._vocabulary:
                    bit = np.uint32(1 << token % BITS)
                    word = unsigned[line, token // BITS]
                    unsigned[line, token // BITS] = word | bit if ends else word & ~bit

    def _may_come(self, token: int, line: int) -> bool:
        return 0 <= token < self._vocabulary and bool(self._words[line, token // BITS] >> token % BITS & 1)
