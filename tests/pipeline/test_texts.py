"""Texts that are no texts, by encoding or content, cost a row with the reason; odd ones that are texts are read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import DocumentError
from pipeline.source.texts import checked_text

ENGLISH = "The harbour committee met in winter.\n"
RUSSIAN = "Комитет гавани собрался зимой.\n"


def tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(ENGLISH)
        archive.addfile(entry, io.BytesIO(ENGLISH.encode()))
    return made.getvalue()


NO_TEXTS: dict[str, tuple[str | bytes, str]] = {
    "UTF-16 with its mark": (ENGLISH.encode("utf-16"), "its text is UTF-16; save it as UTF-8: iconv -f UTF-16"),
    "UTF-16 the other way": (b"\xfe\xff" + ENGLISH.encode("utf-16-be"), "its text is UTF-16"),
    "UTF-32 with its mark": (ENGLISH.encode("utf-32"), "its text is UTF-32"),
    "UTF-16 without a mark": (ENGLISH.encode("utf-16-le"), "50% of its 74 characters are control characters"),
    "UTF-16, big end first": (ENGLISH.encode("utf-16-be"), "control characters, as in UTF-16"),
    "UTF-32 without a mark": (ENGLISH.encode("utf-32-le"), "75% of its"),
    "UTF-16 as a string": (ENGLISH.encode("utf-16-le").decode(), "control characters"),
    "Russian in UTF-16": (RUSSIAN.encode("utf-16-le"), "control characters"),
    "Latin-1": ("Hafenbehörde".encode("latin-1"), "invalid UTF-8 at byte 8"),
    "Windows-1251": (RUSSIAN.encode("cp1251"), "invalid UTF-8 at byte 0"),
    "Shift-JIS": ("港湾委員会".encode("shift-jis"), "invalid UTF-8"),
    "GB18030": ("港口委员会".encode("gb18030"), "invalid UTF-8"),
    "decoded with replacements": (
        RUSSIAN.encode("cp1251").decode(errors="replace"),
        "% of its 31 characters are U\\+FFFD",
    ),
    "a tar archive": (tar(), "control characters"),
    "a table of numbers": (bytes(range(128)) * 9, "control characters"),
    "a PDF of ASCII alone": (b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\n", "it is a PDF file, not text"),
    "RTF": ("{\\rtf1\\ansi The committee met.}", "it is an RTF file"),
    "PostScript": ("%!PS-Adobe-3.0\n/Helvetica findfont", "it is a PostScript file"),
    "zero width": ("\u200b\u200c\u200d\u2060\ufeff" * 50, "its text is blank: of its 250 characters none is seen"),
    "zero width and spaces": (" \u200b\n" * 9, "none is seen"),
    "directions": ("\u202a\u202c\u200e\u200f\u2066\u2069", "none is seen"),
    "soft hyphens": ("\u00ad" * 9, "none is seen"),
    "variation selectors": ("\ufe0f" * 9, "none is seen"),
    "combining marks": ("\u0301\u0302" * 9, "none is seen"),
    "Hangul fillers": ("\u3164\u115f\u1160\uffa0" * 9, "none is seen"),
    "empty Braille": ("\u2800" * 9, "none is seen"),
    "private use": ("\ue000\uf8ff" * 9, "none is seen"),
    "tags": ("\U000e0041\U000e0042" * 9, "none is seen"),
    "no characters of Unicode": ("\ufffe\uffff" * 9, "control characters"),
    "white space": ("\u3000\u00a0\t\n", "its text is blank \\(4 characters of white space\\)"),
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_what_is_no_text_is_told(name: str) -> None:
    value, message = NO_TEXTS[name]
    with pytest.raises(DocumentError, match=message):
        checked_text(value)


# ruff: noqa: RUF001
TEXTS = [
    ENGLISH, RUSSIAN, "港湾委員会", "هیئت\u200cمدیره", "👩\u200d👩\u200d👧", "1", "—", "€", "\u0915\u094d\u200d\u0937",
    "\ufeffmarked", "page one\fpage two", "a log \x1b[31mred\x1b[0m", "one NUL \0" + ENGLISH * 5, "x\ufffd" + ENGLISH,
    "About %PDF-1.4 files", "\r\nlines\r\n", "nel\x85line", "\u200bwords", "\u2801\u2803",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_odd_texts_are_read(text: str) -> None:
    assert checked_text(text) == text
    assert checked_text(text.encode()) == text.removeprefix("\ufeff")


def test_a_large_text_costs_little_time(tmp_path: Path) -> None:
    text = ENGLISH * 200_000
    assert checked_text(text) is text
