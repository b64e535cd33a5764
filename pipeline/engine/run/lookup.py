"""When decode steps verify drafts (prompt lookup): while the live documents' own ones turn out right often enough.

A step with drafts gives a row between one token and 1 + DRAFTS, and takes longer than a plain one. Whether it pays is
seen from the tokens that were read back, so that the choice is the same in every run, and no clock is asked. It changes
which kernels compute a token, not what a token is chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence

# Drafts of a row in a step that verifies some: with four query heads a KV head, 16 queries, as many as a tensor core
# multiplies in any case.
DRAFTS = 3
# What a document without history is taken to get, in tokens of a step that pays, and the weight of a step in the moving
# average (tried on outputs of Qwen2.5-Coder-0.5B: with more, quotations are passed over; with less, outputs that quote
# nothing lose more than 1%).
EXPECTED, WEIGHT = 1.25, 0.1
# Tokens per step and row from which on drafts pay, by device: what a step with drafts costs over a plain one. Measured
# on a CPU: 1.15 (four rows) and 1.31 (one) for the bundled reader at 4,000 tokens, 1.73 for Qwen2.5-Coder-0.5B, whose
# products of four rows take longer than those of one. On an H200 (fp8, Llama-3.1-8B shape) 1.10 for one document of
# 32,768 or 131,072 tokens and 1.19 for 16 of 32,768; tools.benchmark engine, phase lookup, measures it.
PAYS = {"cuda": 1.25, "cpu": 1.6}
# Plain steps before drafts are tried again: doubled by every trial that does not pay.
FIRST_PAUSE, LONGEST_PAUSE = 4, 64


class Gain:
    """Tokens that a step with drafts gives one document: a moving average that begins with `tokens`."""

    def __init__(self, tokens: float = 1.0) -> None:
        self.tokens = tokens

    def note(self, tokens: int) -> None:
        """A step with drafts gave it so many."""
        self.tokens += WEIGHT * (tokens - self.tokens)


class LookupPolicy:
    """Chooses the drafts of each step of the whole batch. pays: tokens per step and row from which on drafts pay."""

    def __init__(self, pays: float) -> None:
        self._pays = pays
        self._pause = FIRST_PAUSE
        self._plain = 0  # steps since the last one with drafts

    def new_gain(self) -> Gain:
        """Of a document that begins to decode."""
        return Gain(EXPECTED * self._pays)

    def drafts(self, gains: Sequence[Gain]) -> int:
        """For a step of documents with these gains: 0 or DRAFTS."""
        if sum(gain.tokens for gain in gains) >= self._pays * len(gains):
            self._pause, self._plain = FIRST_PAUSE, 0
            return DRAFTS
        if self._plain < self._pause:
            self._plain += 1
            return 0
        self._pause, self._plain = min(2 * self._pause, LONGEST_PAUSE), 0
        return DRAFTS
