"""Texts as words with their places, for comparing wordings in any script."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np

# Characters of scripts that put no spaces between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
UNSPACED = (
    "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
# A number with its separators, a word with its combining marks, or one character of an unspaced script.
_WORD = re.compile(rf"([{UNSPACED}]|\d+(?:[.,'\u2019]\d+)*|(?:[^\W\d_{UNSPACED}][\u0300-\u036f]*)+)")
_IS_UNSPACED = re.compile(f"[{UNSPACED}]")
_THOUSANDS = re.compile(r"[.,'\u2019](?=\d{3}(?!\d))")
# Inflected forms of a word mostly agree in their first letters.
STEM = 6


@dataclass(frozen=True)
class Words:
    """The words of a text, in order. starts, ends: int64 [words], in characters of the text.

    Of scripts without spaces the words are pairs of neighbouring characters, which overlap.
    """

    words: list[str]
    starts: np.ndarray
    ends: np.ndarray


def split_words(text: str) -> Words:
    """The words of a text."""
    parts = _WORD.split(text)  # what stands between words, and words, in turn
    ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
    words, starts, ends, gaps = parts[1::2], ends[:-1:2], ends[1::2], parts[2:-1:2]
    if _IS_UNSPACED.search(text):
        single = [bool(_IS_UNSPACED.match(word)) for word in words]
        pairs = np.array(
            [a and b and not gap for a, b, gap in zip(single, single[1:], gaps, strict=False)] + [False], dtype=bool
        )
        ends = np.where(pairs, np.roll(ends, -1), ends)
        following = [*words[1:], ""]
        words = [word + after if pair else word for word, after, pair in zip(words, following, pairs, strict=True)]
    return Words(words, starts, ends)


def fold(word: str) -> str:
    """What two spellings or forms of a word share: no case, no thousands separators, its first letters only."""
    if not word.isascii():
        word = unicodedata.normalize("NFKC", word)
    return _THOUSANDS.sub("", word) if word[:1].isdigit() else word.casefold()[:STEM]
