"""How like two outputs are, as text."""

from __future__ import annotations

import re

from rapidfuzz.distance import Indel

# Runs of letters and digits; Chinese and Japanese characters, which no spaces part, are words themselves.
_CHARACTER = "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_CHARACTER}]|[^\W_{_CHARACTER}]+")


def words(text: str) -> list[str]:
    """What ROUGE-L compares: words without punctuation and case, of any script."""
    return _WORD.findall(text.lower())


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), F1: 2 LCS / (m + n) over the words of both; 1 if neither has any.

    That is the normalised Indel similarity of the two sequences of words.
    """
    return Indel.normalized_similarity(words(text), words(reference))


def exact_match(text: str, reference: str) -> bool:
    """Whether both are the same but for white space around them."""
    return text.strip() == reference.strip()
