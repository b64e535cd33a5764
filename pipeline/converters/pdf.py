"""PDF files: the text of each page, in the order in which the file draws it."""

from __future__ import annotations

from typing import Any

from pipeline.converters.protocol import MOST_BYTES, ConversionError, Converted

BETWEEN_PAGES = "\n\n"
# "%%EOF" stands in a whole file's last bytes (ISO 32000-1, 7.5.5; readers look so far back).
_END, _END_WITHIN = b"%%EOF", 1024
# Where a larger share of the pages are pictures the text is not the document's.
_MOST_PICTURES = 0.5
# A picture over so much of a page, and no more characters than this: a scan with a stamp or a page number.
_OF_A_PAGE, _OF_A_STAMP = 0.8, 200


def convert(data: bytes, encoding: str) -> Converted:
    """The text and where its pages begin; a PDF knows its own encodings. Raises ConversionError."""
    document = _opened(data)
    count = len(document)
    if not count:
        raise ConversionError("it has no pages")
    pages: list[str] = []
    starts: list[int] = []
    length, pictures, stamped = 0, 0, 0
    for number in range(count):
        text, is_picture = _page(document, number, count)
        starts.append(length)
        pages.append(text)
        pictures += is_picture and not text
        stamped += is_picture and bool(text)
        length += len(text) + len(BETWEEN_PAGES)
        if length > MOST_BYTES:
            raise ConversionError(f"its text has more than {MOST_BYTES:,} characters; no more are read")
    note = _note(pictures, stamped, count, any(pages))
    return Converted(BETWEEN_PAGES.join(pages), tuple(starts), note)


def _note(pictures: int, stamped: int, count: int, any_text: bool) -> str:
    """What is missing of a document some of whose pages are pictures. Raises ConversionError if too many hold no text.

    stamped: pages with a few words. Whoever recognised a scan's text leaves some, such as title pages; and slides may
    be so, which is why it is no error.
    """
    if not pictures and not any_text:
        raise ConversionError(f"its {count:,} pages are blank")
    what = f"{pictures:,} of {count:,} pages hold pictures and no text"
    ocr = "run OCR first: ocrmypdf --skip-text IN.pdf OUT.pdf"
    if pictures and (not any_text or pictures > _MOST_PICTURES * count):
        raise ConversionError(f"{what}, as scans do; {ocr}")
    notes = [f"{what}; if they are scans, {ocr}"] if pictures else []
    if pictures + stamped > _MOST_PICTURES * count:
        notes.append(
            f"{stamped:,} of {count:,} pages are pictures with a few words, as scans with a stamp are; "
            "if so, run OCR first: ocrmypdf --redo-ocr IN.pdf OUT.pdf"
        )
    return "; ".join(notes)


def _opened(data: bytes) -> Any:
    import pypdfium2
    import pypdfium2.raw as pdfium

    try:
        document = pypdfium2.PdfDocument(data)
        count = len(document)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == pdfium.FPDF_ERR_PASSWORD:
            raise ConversionError(
                "it is encrypted; take the password out first: qpdf --decrypt --password=... IN.pdf OUT.pdf"
            ) from None
        raise ConversionError(f"it is no PDF file, or a damaged one ({error}); get it again from its source") from None
    # pdfium makes do with what is there, so that a file which was cut off would lose pages without a word.
    if _END not in data.rstrip(b"\0\t\r\n ")[-_END_WITHIN:]:
        raise ConversionError(
            f"it breaks off (%%EOF is missing at its end; {count:,} pages were found): get it again from its source"
        )
    return document


def _page(document: Any, number: int, count: int) -> tuple[str, bool]:
    """A page's text, and whether it is a picture: it holds something, but no text, or next to none on a picture."""
    import pypdfium2
    import pypdfium2.raw as pdfium

    try:
        page = document[number]
        try:
            holder = page.get_textpage()
            try:
                text = _tidy(holder.get_text_range())
            finally:
                holder.close()
            if text:
                return text, len(text) <= _OF_A_STAMP and _covered(page) >= _OF_A_PAGE
            return text, pdfium.FPDFPage_CountObjects(page) > 0
        finally:
            page.close()
    except pypdfium2.PdfiumError as error:
        raise ConversionError(f"its page {number + 1:,} of {count:,} cannot be read: {error}") from None


def _covered(page: Any) -> float:
    """The share of a page that pictures cover; they do not overlap on scans. Of a page that shows nothing, 0."""
    import pypdfium2.raw as pdfium

    width, height = page.get_size()
    if not width * height:  # cut to a place where the page is not
        return 0.0
    boxes = [picture.get_bounds() for picture in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE])]
    return float(sum((right - left) * (top - bottom) for left, bottom, right, top in boxes) / (width * height))


def _tidy(text: str) -> str:
    """Lines as texts have them, and words whole that were divided between lines: there pdfium has U+FFFE or U+0002."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for mark in ("\ufffe", "\x02"):
        text = text.replace(mark + "\n", "").replace(mark, "")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
