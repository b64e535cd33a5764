"""Holding decoding to a schema with llguidance: which tokens may come next, computed on the host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.answers.checks import grammar_text
from pipeline.errors import JobError, one_line


class Grammar:
    """A schema compiled for a tokenizer. matcher() starts an output.

    Copies of one of llguidance's matchers share a lexer, and its lock: their masks are computed one after the other,
    whatever threads there are. So each output has a matcher compiled for it, or one of an output that has ended, whose
    lexer knows most states already.
    Raises JobError if the tokenizer is of a kind that llguidance does not read.
    """

    def __init__(self, schema: str, tokenizer: Any, eos_ids: tuple[int, ...] = ()) -> None:
        """schema: its JSON text. tokenizer: of transformers. eos_ids: end outputs; unset: the tokenizer's."""
        self._known, self._text = _tokenizer(tokenizer, eos_ids), grammar_text(schema)
        self._words = -(-self._known.vocab_size // 32)
        self._free = [self._compiled()]
        if self._free[0].is_error():
            raise JobError(f"--schema: {one_line(self._free[0].get_error(), 200)}")

    def matcher(self) -> Matcher:
        """What follows one output, from its first token on."""
        return Matcher(self._free.pop() if self._free else self._compiled(), self._words, self._free)

    def _compiled(self) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self._known, self._text, log_level=0)


def _tokenizer(tokenizer: Any, eos_ids: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer; it takes a second or so to make."""
    from llguidance import LLTokenizer
    from llguidance.hf import from_tokenizer

    eos = list(eos_ids) or tokenizer.eos_token_id
    if eos is None:
        raise JobError("--schema: the model's tokenizer names no end-of-sequence token, so that no answer could end")
    try:
        return from_tokenizer(tokenizer, eos_token=eos, slices=LLTokenizer.json_slices())
    except Exception as error:  # llguidance raises ValueError, and what its Rust side makes of a file
        raise JobError(
            f"--schema: the model's tokenizer cannot be used with a schema: {one_line(error, 200)}; it needs a "
            "tokenizer.json"
        ) from None


class Matcher:
    """Which tokens may come next in one output. Deterministic: it follows from the tokens alone.

    raw: llguidance's matcher. words: of 32 tokens, that its masks have. free: where close() leaves it for others.
    """

    def __init__(self, raw: Any, words: int, free: list[Any]) -> None:
        self.raw = raw
        self.words = words
        self._free = free

    @property
    def complete(self) -> bool:
        """Whether the output may end here."""
        return self.raw.is_accepting()

    @property
    def done(self) -> bool:
        """Whether the output is complete, and nothing can follow."""
        return self.raw.is_stopped()

    @property
    def error(self) -> str:
        """Why it cannot go on (a limit of llguidance, say); empty if it can."""
        # What follows the mark is llguidance's inner state.
        return one_line(self.raw.get_error().partition("<state>")[0], 200) if self.raw.is_error() else ""

    def take(self, token: int) -> None:
        """Go on behind `token`; `error` says if that cannot be."""
        self.raw.consume_token(token)

    def go_back(self, tokens: int) -> None:
        """Forget the newest `tokens` of what was taken."""
        self.raw.rollback(tokens)

    def close(self) -> None:
        """The output has ended: another one may have this matcher, which must not be used here any more."""
        self.raw.reset()
        if not self.raw.is_error():  # it would stay broken
            self._free.append(self.raw)
        self.raw = None


class MaskFiller:
    """Computes masks of several outputs at a time, in llguidance's own threads.

    rows: most outputs at a time.
    """

    def __init__(self, rows: int) -> None:
        from llguidance import LLExecutor

        self._rows = rows
        # One core is left for the thread that launches the steps.
        self._executor = LLExecutor(max(1, min(16, len(os.sched_getaffinity(0)) - 1)))
        self._words = np.zeros((0, 0), dtype=np.int32)

    def fill(self, matchers: Mapping[int, Matcher], masks: np.ndarray) -> None:
        """Write row by row which tokens may come next; rows without a matcher stay as they are.

        masks: int32 [rows, W]; bit t % 32 of word t // 32 is token t. What the tokenizer does not know may not come.
        """
        for words in {matcher.words for matcher in matchers.values()}:  # one, but where tokenizers differ
            here = {row: matcher for row, matcher in matchers.items() if matcher.words == words}
            if self._words.shape[1] != words:
                self._words = np.zeros((self._rows, words), dtype=np.int32)
            calls = [(matcher.raw, place) for place, matcher in enumerate(here.values())]
            self._executor.unsafe_compute_mask_ptr(calls, self._words.ctypes.data, 4 * words, self._rows)
            count = min(words, masks.shape[1])
            for place, row in enumerate(here):
                masks[row, :count] = self._words[place, :count]
                masks[row, count:] = 0
