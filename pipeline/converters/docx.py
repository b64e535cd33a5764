"""Word documents (.docx): paragraphs, lists, tables and notes, in the order of the text.

As accepted: inserted text is there, deleted text and comments are not. Headers, footers, pictures and formulas are not.
"""

from __future__ import annotations

import io

from pipeline.converters.archives import Archive
from pipeline.converters.html import page_text
from pipeline.converters.protocol import ConversionError, Converted


def convert(data: bytes, encoding: str) -> Converted:
    """The text of a Word document; a docx knows its own encoding. Raises ConversionError."""
    import mammoth

    archive = Archive(data, "DOCX file")
    if "word/document.xml" not in archive.names and "_rels/.rels" not in archive.names:
        raise ConversionError("it is no DOCX file: its archive has no word/document.xml")
    archive.admit((".xml", ".rels"))
    without = mammoth.images.img_element(lambda image: {})
    page = mammoth.convert_to_html(io.BytesIO(data), convert_image=without).value
    if not page.strip():
        raise ConversionError("its text is empty")
    return Converted(page_text(page))
