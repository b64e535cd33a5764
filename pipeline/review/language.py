"""The language of a text, by py3langid: 97 and more languages, told by a model of 5 MB that it carries."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

# Letters of an output from which its language can be told; Chinese and Japanese say it in fewer.
LEAST_LETTERS, LEAST_UNSPACED = 60, 15
# Probability that the classifier must give both languages.
SURE = 0.98
# Characters of each of three pieces of a document: its start, its middle, its end.
PIECE = 1000
_HAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_LETTER = re.compile(r"[^\W\d_]")


def is_other_language(text: str, output: str) -> bool:
    """Whether an output is in another language than most of its document. False where either one is not clear."""
    letters = len(_LETTER.findall(output))
    if letters < LEAST_LETTERS and len(_HAN.findall(output)) < LEAST_UNSPACED:
        return False
    language, probability = _classifier().classify(output[: 4 * PIECE])
    if probability < SURE:
        return False
    middle = max(0, len(text) // 2 - PIECE // 2)
    pieces = (text[:PIECE], text[middle : middle + PIECE], text[-PIECE:]) if len(text) > 3 * PIECE else (text,)
    found = [_classifier().classify(piece) for piece in pieces]
    # A document in several languages, or with a table in its middle, has none of its own.
    return all(other != language and sure >= SURE for other, sure in found)


@cache
def _classifier() -> Any:
    # 1.5 s: loaded for the first output that is long enough.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
