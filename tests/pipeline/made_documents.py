"""PDF, DOCX, EPUB and HTML files made by hand, for tests of what reads them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from xml.sax.saxutils import escape

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
Texts = Sequence[tuple[float, float, str]]  # x, y, what stands there


def pdf(pages: Sequence[Texts | str | None], encrypt: str = "", behind: bool = False) -> bytes:
    """A PDF file. A page is a text, texts at places of it, "" for a blank one, None for a picture without text.

    encrypt: the dictionary of an encryption that nothing here carries out: readers ask for the password.
    behind: whether a picture fills each page behind its text.
    """
    font = len(pages) * 2 + 3
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for number, page in enumerate(pages):
        drawn = f"{'q 612 0 0 792 0 0 cm /I Do Q ' * behind}{_drawn(page)}"
        resources = f"/Resources << /Font << /F {font} 0 R >> /XObject << /I {font + 1} 0 R >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {resources} /Contents {4 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    picture = "/Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8"
    objects.append(f"<< {picture} /Length 1 >>\nstream\nx\nendstream")
    if encrypt:
        objects.append(encrypt)
    out, places = "%PDF-1.7\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{item}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    more = f" /Encrypt {len(objects)} 0 R /ID [<00><00>]" if encrypt else ""
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R{more} >>\nstartxref\n{out.index('xref')}\n%%EOF\n"
    return out.encode("cp1252")


PASSWORD = f"<< /Filter /Standard /V 1 /R 2 /O <{'41' * 32}> /U <{'42' * 32}> /P -4 >>"


def _drawn(page: Texts | str | None) -> str:
    if page is None:
        return "q 500 0 0 700 50 50 cm /I Do Q"
    texts = [(72, 720 - 14 * i, line) for i, line in enumerate(page.splitlines())] if isinstance(page, str) else page
    escaped = ((x, y, text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")) for x, y, text in texts)
    return "\n".join(f"BT /F 12 Tf {x} {y} Td ({text}) Tj ET" for x, y, text in escaped)


def archive(members: dict[str, str | bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as packed:
        for name, data in members.items():
            packed.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def docx(body: str, more: dict[str, str | bytes] | None = None) -> bytes:
    """A Word file whose body is this XML (prefix w)."""
    types = (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
        'wordprocessingml.document.main+xml"/></Types>'
    )
    relations = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r" '
        'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
        'Target="word/document.xml"/></Relationships>'
    )
    document = f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>'
    members: dict[str, str | bytes] = {"[Content_Types].xml": types, "_rels/.rels": relations}
    return archive(members | {"word/document.xml": document} | (more or {}))


def paragraph(text: str) -> str:
    """A paragraph of a Word file."""
    return f"<w:p><w:r><w:t>{escape(text)}</w:t></w:r></w:p>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of a Word file."""
    cells = ("".join(f"<w:tc>{paragraph(text)}</w:tc>" for text in row) for row in rows)
    return "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"


def epub(
    chapters: dict[str, str | bytes], more: dict[str, str | bytes] | None = None, spine: Sequence[str] = ()
) -> bytes:
    """A book of these chapters: file names and bodies, or whole pages as bytes. spine: their order, if another."""
    items = "".join(
        f'<item id="i{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(chapters)
    )
    order = [list(chapters).index(name) for name in spine or chapters]
    references = "".join(f'<itemref idref="i{n}"/>' for n in order)
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        f"<manifest>{items}</manifest><spine>{references}</spine></package>"
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    members: dict[str, str | bytes] = {"mimetype": "application/epub+zip", "META-INF/container.xml": container}
    members["OEBPS/book.opf"] = package
    for name, body in chapters.items():
        page = f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head><body>{body}</body></html>'  # type: ignore[str-bytes-safe]
        members[f"OEBPS/{name}".replace("%20", " ")] = body if isinstance(body, bytes) else page
    return archive(members | (more or {}))
