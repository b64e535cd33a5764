"""What counts as a text: bytes of it are UTF-8, people can see something of it, and it is no other thing than text."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from pipeline.decoding import UTF_8, EncodingError, decode, mark_of
from pipeline.errors import DocumentError

# A text of which a larger share is control characters is another encoding (UTF-16 has a NUL in every Latin letter) or
# binary; of which a larger share is U+FFFD was once decoded as what it is not.
MOST_CONTROLS = 0.02
MOST_REPLACED = 0.1
_FILES = {"%PDF-": "a PDF file", "{\\rtf": "an RTF file", "%!PS-": "a PostScript file"}
# C0 and C1 but tab, line and page breaks, the ESC of terminals' logs and NEL; and what Unicode gives to nothing.
_CONTROLS = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef\ufffe\uffff]")
# Letters and symbols in name, of which nothing is seen: fillers of Hangul, a Braille cell without dots, and such.
_EMPTY_GLYPHS = "\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufffc"


def checked_text(value: Any) -> str:
    """A document's text. Raises DocumentError with what is wrong with it."""
    if isinstance(value, bytes):
        value = _decoded(value)
    if value is None:
        raise DocumentError("its text is null")
    if not isinstance(value, str):
        raise DocumentError(f"its text is {type(value).__name__}, expected a string")
    if not value:
        raise DocumentError("its text is empty (0 bytes)")
    if value.isspace():
        raise DocumentError(f"its text is blank ({len(value)} characters of white space)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(f"its text has a lone surrogate at character {error.start}; no UTF-8 can hold it") from None
    _refuse_no_text(value)
    return value


def refuse_marked(value: bytes) -> None:
    """Raise DocumentError for what begins with the mark of another encoding than UTF-8."""
    if name := mark_of(value):
        raise DocumentError(f"its text is {name}; save it as UTF-8: iconv -f {name} -t UTF-8")


def decoded(value: bytes, encoding: str) -> str:
    """The text of a file's bytes in the encoding that was asked for. Raises DocumentError."""
    if encoding == UTF_8 and (name := mark_of(value)):
        raise DocumentError(
            f"its text is {name}; give --encoding {name.lower()}, or save it as UTF-8: iconv -f {name} -t UTF-8"
        )
    try:
        return decode(value, encoding)
    except EncodingError as error:
        raise DocumentError(str(error)) from None


def _decoded(value: bytes) -> str:
    refuse_marked(value)
    try:
        return value.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DocumentError(f"invalid UTF-8 at byte {error.start}: {error.reason}; save the text as UTF-8") from None


def _refuse_no_text(text: str) -> None:
    """Raise DocumentError for what decodes and yet is no text."""
    for mark, name in _FILES.items():
        if text.startswith(mark):
            raise DocumentError(f"it is {name}, not text; give it a file of its own, or take the text out of it first")
    controls = len(_CONTROLS.findall(text))
    if controls > MOST_CONTROLS * len(text):
        share = f"{controls / len(text):.0%} of its {len(text):,} characters are control characters"
        raise DocumentError(f"its text is no text: {share}, as in UTF-16 or a binary file; save it as UTF-8")
    replaced = text.count("\ufffd")
    if replaced > MOST_REPLACED * len(text):
        share = f"{replaced / len(text):.0%} of its {len(text):,} characters are U+FFFD"
        raise DocumentError(f"its text was decoded wrongly: {share}; make it anew from its source")
    if not any(map(_seen, text)):
        raise DocumentError(f"its text is blank: of its {len(text):,} characters none is seen")


def _seen(char: str) -> bool:
    """Whether a character leaves a mark by itself: not white space, formats, private use, marks without a letter."""
    return unicodedata.category(char)[0] in "LNPS" and char not in _EMPTY_GLYPHS
