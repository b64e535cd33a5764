"""Flags: what is suspicious about an output, by its text, its document and how it ended."""

from __future__ import annotations

import re

import numpy as np

from pipeline.review.language import is_other_language
from pipeline.review.refusals import REFUSALS, is_refusal

# Repetitive: a run of words that comes at least LEAST_TIMES times in a row, LEAST_RUN words in all; runs of up to
# LONGEST_UNIT words are looked for.
LEAST_TIMES, LEAST_RUN, LONGEST_UNIT = 3, 24, 100
# Copied: an output of at least LEAST_COPY characters of which one passage of the document holds COPIED_SHARE.
LEAST_COPY, COPIED_SHARE = 200, 0.9
# Characters in the middle of the output by which such a passage is found, and places that are looked at.
_ANCHOR, _ANCHOR_PLACES = 32, 50

FLAGS = {
    "cut": "it ends at `--max-new-tokens`, or that of a part does",
    "empty": "there is nothing but white space",
    "refused": "it begins by saying that the model cannot or will not do it, or that it has no document "
    f"({', '.join(REFUSALS)})",
    "repetitive": f"the same 1 to {LONGEST_UNIT} words stand {LEAST_TIMES} or more times in a row, {LEAST_RUN} words "
    "in all; numbers at the beginning of lines do not count",
    "other_language": "it is in another language than the start, middle and end of the document",
    "copied": f"at least {COPIED_SHARE:.0%} of it, and {LEAST_COPY} characters, are one passage of the document, word "
    "for word",
}

_LINE_NUMBER = re.compile(r"^[ \t]*\(?\d+[.):]?[ \t]", re.MULTILINE)
# Words, and other marks but those that lines and tables are drawn with.
_PIECE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s\-=_*#~|:+.\u2500-\u257f]")


def find_flags(text: str, output: str, finish_reason: str | None = None) -> list[str]:
    """The flags of an output, in the order of FLAGS. text: the document's. finish_reason: stop or length."""
    begin = output.strip()
    if not begin:
        return [*(["cut"] if finish_reason == "length" else []), "empty"]
    raised = {
        "cut": finish_reason == "length",
        "refused": is_refusal(begin),
        "repetitive": is_repetitive(begin),
        "other_language": is_other_language(text, begin),
        "copied": is_copied(text, begin),
    }
    return [name for name in FLAGS if raised.get(name)]


def is_repetitive(output: str) -> bool:
    """Whether an output goes round in circles somewhere: the same words LEAST_TIMES times in a row."""
    pieces = _PIECE.findall(_LINE_NUMBER.sub("", output).lower())
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(piece, len(numbers)) for piece in pieces], dtype=np.int64)
    for unit in range(1, min(LONGEST_UNIT, len(ids) // LEAST_TIMES) + 1):
        differs = np.flatnonzero(ids[unit:] != ids[:-unit])
        same = np.diff(differs, prepend=-1, append=len(ids) - unit).max() - 1
        if same + unit >= max(LEAST_TIMES * unit, LEAST_RUN):
            return True
    return False


def is_copied(text: str, output: str) -> bool:
    """Whether nearly all of an output is one passage of the document; white space does not count."""
    from rapidfuzz.distance import Postfix, Prefix  # here: a command line asks for the names of the flags

    said = " ".join(output.split())
    if len(said) < LEAST_COPY:
        return False
    source = " ".join(text.split())
    middle = len(said) // 2
    before, after = said[:middle], said[middle:]
    place = source.find(after[:_ANCHOR])
    for _ in range(_ANCHOR_PLACES):
        if place < 0:
            return False
        behind = Prefix.similarity(after, source[place : place + len(after)])
        ahead = Postfix.similarity(before, source[max(0, place - middle) : place])
        if ahead + behind >= COPIED_SHARE * len(said):
            return True
        place = source.find(after[:_ANCHOR], place + 1)
    return False
