"""The language of a text, by py3langid, which carries a model of 5 MB for some hundred languages."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from typing import Any

# Letters of an output from which its language can be told; Chinese and Japanese say it in fewer.
LEAST_LETTERS, LEAST_UNSPACED = 60, 15
# Probability that the classifier must give both languages.
SURE = 0.98
# Languages so close that the classifier shares short texts out among them: they count as one.
CLOSE = (
    ("zh", "wuu", "yue"), ("no", "nb", "nn", "da"), ("hr", "bs", "sr", "sh"), ("id", "ms"), ("cs", "sk"), ("pt", "gl"),
)  # fmt: skip
_GROUP = {language: group[0] for group in CLOSE for language in group}
# Characters of each of three pieces of a document: its start, its middle, its end.
PIECE = 1000
_HAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_LETTER = re.compile(r"[^\W\d_]")


def is_other_language(text: str, output: str) -> bool:
    """Whether an output is in another language than most of its document. False where either one is not clear."""
    letters = len(_LETTER.findall(output))
    if letters < LEAST_LETTERS and len(_HAN.findall(output)) < LEAST_UNSPACED:
        return False
    language, probability = _language(output[: 4 * PIECE])
    if probability < SURE:
        return False
    middle = max(0, len(text) // 2 - PIECE // 2)
    pieces = (text[:PIECE], text[middle : middle + PIECE], text[-PIECE:]) if len(text) > 3 * PIECE else (text,)
    found = [_language(piece) for piece in pieces]
    # A document in several languages, or with a table in its middle, has none of its own.
    return all(other != language and sure >= SURE for other, sure in found)


def _language(text: str) -> tuple[str, float]:
    """The most likely language, or the first one of its group, and its probability."""
    shares: dict[str, float] = defaultdict(float)
    for language, probability in _classifier().rank(text):
        shares[_GROUP.get(language, language)] += float(probability)
    return max(shares.items(), key=lambda item: item[1])


@cache
def _classifier() -> Any:
    # 0.5 to 1.5 s: loaded for the first output that is long enough.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
