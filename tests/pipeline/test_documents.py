"""PDF, DOCX, HTML and EPUB as inputs: their text, and what is told of files that have none or do harm."""

from __future__ import annotations

import io
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from made_documents import PASSWORD, archive, docx, epub, paragraph, pdf, table
from patience import patient

from pipeline import summarize
from pipeline.errors import DocumentError, JobError
from pipeline.job.plan import survey_input
from pipeline.location import _opened
from pipeline.results.kept_columns import Kept
from pipeline.settings.config import JobConfig
from pipeline.settings.shared import ReadSettings
from pipeline.source import FORMATS, DocumentReader, Format, converted, find_files, list_documents
from pipeline.source.formats import SUFFIXES


def read(tmp_path: Path, name: str, data: bytes, **settings: Any) -> tuple[str, Kept]:
    path = tmp_path / name
    path.write_bytes(data)
    catalogue = list_documents(find_files((str(path),))[0])
    assert len(catalogue) == 1
    document = catalogue.document(0)
    assert document.error == ""
    return DocumentReader("text", [], ReadSettings(**settings)).read(document)


def text(tmp_path: Path, name: str, data: bytes, **settings: Any) -> str:
    return read(tmp_path, name, data, **settings)[0]


def told(tmp_path: Path, name: str, data: bytes, **settings: Any) -> str:
    with pytest.raises(DocumentError) as raised:
        read(tmp_path, name, data, **settings)
    message = str(raised.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


class TestPdf:
    def test_its_pages_can_be_found_in_its_text(self, tmp_path: Path) -> None:
        pages = ["The first page\nhas two lines.", "", "Page three: caf\xe9 (a) \\ b."]
        found, kept = read(tmp_path, "a.pdf", pdf(pages))
        assert kept.page_starts is not None
        ends = [start - 2 for start in kept.page_starts[1:]] + [len(found)]
        assert [found[start:end] for start, end in zip(kept.page_starts, ends, strict=True)] == pages
        assert kept.note == "", "a blank page is no loss"

    def test_columns_come_one_after_the_other(self, tmp_path: Path) -> None:
        left = [(72, 700 - 14 * i, f"left {i} of the column.") for i in range(5)]
        right = [(330, 700 - 14 * i, f"right {i} of the column.") for i in range(5)]
        lines = text(tmp_path, "a.pdf", pdf([left + right])).splitlines()
        assert [line.split(" of")[0] for line in lines] == [f"left {i}" for i in range(5)] + [
            f"right {i}" for i in range(5)
        ]

    def test_a_row_of_a_table_is_a_line(self, tmp_path: Path) -> None:
        cells = [(72 + 120 * x, 700 - 20 * y, f"r{y}c{x}") for y in range(3) for x in range(3)]
        lines = text(tmp_path, "a.pdf", pdf([cells])).splitlines()
        assert [line.split() for line in lines] == [[f"r{y}c{x}" for x in range(3)] for y in range(3)]

    def test_a_scan_is_told_with_what_to_do(self, tmp_path: Path) -> None:
        error = told(tmp_path, "a.pdf", pdf([None, None, ""]))
        assert error == (
            "2 of 3 pages hold pictures and no text, as scans do; run OCR first: ocrmypdf --skip-text IN.pdf OUT.pdf"
        )
        assert told(tmp_path, "a.pdf", pdf([None, None, "a cover sheet"])).startswith("2 of 3 pages")

    def test_a_few_pictures_among_pages_are_noted(self, tmp_path: Path) -> None:
        found, kept = read(tmp_path, "a.pdf", pdf(["one", None, "three", "four"]))
        assert found == "one\n\n\n\nthree\n\nfour"
        assert kept.note == (
            "1 of 4 pages hold pictures and no text; "
            "if they are scans, run OCR first: ocrmypdf --skip-text IN.pdf OUT.pdf"
        )
        assert kept.page_starts == (0, 5, 7, 14)

    def test_scans_with_a_stamp_are_noted(self, tmp_path: Path) -> None:
        stamped = [f"Page {i} of 4" for i in range(4)]
        found, kept = read(tmp_path, "a.pdf", pdf(stamped, behind=True))
        assert found == "\n\n".join(stamped)
        assert kept.note == (
            "4 of 4 pages are pictures with a few words, as scans with a stamp are; "
            "if so, run OCR first: ocrmypdf --redo-ocr IN.pdf OUT.pdf"
        )
        recognised = ["A line that was recognised.\n" * 9] * 2
        for others in (pdf([*recognised, "A title page"], behind=True), pdf(stamped)):
            assert read(tmp_path, "a.pdf", others)[1].note == ""

    def test_a_page_that_is_cut_to_nothing_keeps_its_text(self, tmp_path: Path) -> None:
        whole = pdf(["one"])
        cut = whole.replace(b"/MediaBox [0 0 612 792]", b"/MediaBox [0 0 612 792] /CropBox [9999 9999 9999.5 9999.5]")
        assert cut != whole
        found, kept = read(tmp_path, "a.pdf", cut)
        assert (found, kept.note) == ("one", "")

    def test_one_without_anything_is_told(self, tmp_path: Path) -> None:
        assert told(tmp_path, "a.pdf", pdf(["", ""])) == "its 2 pages are blank"
        assert told(tmp_path, "a.pdf", pdf([])).startswith("it is no PDF file, or a damaged one")

    def test_an_encrypted_one_is_told(self, tmp_path: Path) -> None:
        error = told(tmp_path, "a.pdf", pdf(["secret"], PASSWORD))
        assert error.startswith("it is encrypted; take the password out first: qpdf --decrypt")

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
    def test_one_that_was_cut_off_is_never_read_as_if_it_were_whole(self, tmp_path: Path, share: float) -> None:
        whole = pdf([f"page {i}" for i in range(40)])
        error = told(tmp_path, "a.pdf", whole[: int(share * len(whole))])
        assert "get it again from its source" in error

    def test_what_is_no_pdf_is_told(self, tmp_path: Path) -> None:
        assert told(tmp_path, "a.pdf", b"<html>404</html>").startswith("it is no PDF file, or a damaged one")
        assert told(tmp_path, "a.pdf", b"") == "its file is empty (0 bytes)"

    def test_ten_thousand_pages(self, tmp_path: Path) -> None:
        found, kept = read(tmp_path, "a.pdf", pdf([f"page {i}" for i in range(10_000)]))
        assert kept.page_starts is not None
        assert len(kept.page_starts) == 10_000
        assert found[kept.page_starts[8765] :].startswith("page 8765\n")

    def test_one_that_takes_too_long_is_told(self, tmp_path: Path) -> None:
        error = told(tmp_path, "a.pdf", pdf(["x" * 80] * 10_000), conversion_seconds=0.05)
        assert error == "it was not converted within 0.05 s; --conversion-seconds gives it more, or split the file"

    def test_a_page_tree_in_a_circle_ends(self, tmp_path: Path) -> None:
        circle = pdf(["one", "two"]).replace(b"/Kids [3 0 R 5 0 R]", b"/Kids [2 0 R 5 0 R]")
        assert circle != pdf(["one", "two"])
        assert told(tmp_path, "a.pdf", circle) == "its page 2 of 2 cannot be read: Failed to load page."


class TestDocx:
    def test_paragraphs_and_tables_in_their_order(self, tmp_path: Path) -> None:
        body = paragraph("Before & <after>") + table([["Year", "Sales"], ["2025", "1,200"]]) + paragraph("After. é港")
        lines = text(tmp_path, "a.docx", docx(body)).splitlines()
        assert lines[0] == "Before & <after>"
        assert lines[-1] == "After. é港"
        assert [line.split() for line in lines[1:-1] if line.strip()] == [["Year", "Sales"], ["2025", "1,200"]]

    def test_changes_are_read_as_accepted(self, tmp_path: Path) -> None:
        body = (
            "<w:p><w:r><w:t>kept </w:t></w:r><w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
            "<w:ins><w:r><w:t>new</w:t></w:r></w:ins></w:p>"
        )
        assert text(tmp_path, "a.docx", docx(body)) == "kept new"

    def test_pictures_are_not_in_the_text(self, tmp_path: Path) -> None:
        data = docx(paragraph("text"), {"word/media/image1.png": b"\x89PNG" * 999})
        assert text(tmp_path, "a.docx", data) == "text"

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"PK\x03\x04 and no more", "it is no DOCX file, or is cut off"),
            (docx(paragraph("t" * 999))[:-40], "it is no DOCX file, or is cut off"),
            (
                b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
                "it is an old Word file or has a password, no DOCX file",
            ),
            (archive({"a.txt": "x"}), "it is no DOCX file: its archive has no word/document.xml"),
            (docx(""), "its text is empty"),
            (docx("<w:p>"), "it cannot be read: ExpatError"),
        ],
    )
    def test_what_is_none_is_told(self, tmp_path: Path, data: bytes, message: str) -> None:
        assert message in told(tmp_path, "a.docx", data)

    def test_entities_that_multiply_are_refused(self, tmp_path: Path) -> None:
        levels = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
        laugh = f'<!DOCTYPE d [<!ENTITY l0 "ha">{levels}]>'
        good = docx(paragraph("LAUGH"))
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as out, zipfile.ZipFile(io.BytesIO(good)) as source:
            for name in source.namelist():
                data = source.read(name)
                if name == "word/document.xml":
                    data = laugh.encode() + data.replace(b"LAUGH", b"&l11;")
                out.writestr(name, data)
        assert "amplification" in told(tmp_path, "a.docx", (tmp_path / "x.zip").read_bytes())


class TestEpub:
    def test_chapters_come_in_the_order_of_the_spine(self, tmp_path: Path) -> None:
        chapters = {"two.xhtml": "<h1>Two</h1><p>second&nbsp;one</p>", "text/one%201.xhtml": "<p>first <b>one</b></p>"}
        data = epub(chapters, spine=list(reversed(chapters)))
        assert text(tmp_path, "a.epub", data) == "first one\n\nTwo\n\nsecond one"

    def test_places_in_a_chapter_are_no_chapters(self, tmp_path: Path) -> None:
        data = epub({"a.xhtml": "<p>one</p>", "a.xhtml#2": "", "b.xhtml": "<p>two</p>", "a.xhtml#3": ""})
        assert text(tmp_path, "a.epub", data) == "one\n\ntwo"

    def test_chapters_in_other_encodings(self, tmp_path: Path) -> None:
        page = '<?xml version="1.0" encoding="iso-8859-1"?><html><body><p>caf\xe9</p></body></html>'
        assert text(tmp_path, "a.epub", epub({"a.xhtml": page.encode("latin-1")})) == "café"

    def test_a_chapter_that_is_not_well_formed_is_read_as_a_page(self, tmp_path: Path) -> None:
        assert text(tmp_path, "a.epub", epub({"a.xhtml": "<p>open <br> & so <i>on</p>"})) == "open\n& so on"

    def test_one_that_is_protected_is_told(self, tmp_path: Path) -> None:
        def encryption(method: str) -> dict[str, str | bytes]:
            data = f'<EncryptedData><EncryptionMethod Algorithm="{method}"/></EncryptedData>'
            return {"META-INF/encryption.xml": f"<encryption>{data}</encryption>"}

        chapters = {"a.xhtml": "<p>text</p>"}
        fonts = encryption("http://www.idpf.org/2008/embedding")
        assert text(tmp_path, "a.epub", epub(chapters, fonts)) == "text"
        locked = encryption("http://www.w3.org/2001/04/xmlenc#aes128-cbc")
        assert "protected against copying (DRM)" in told(tmp_path, "a.epub", epub(chapters, locked))

    def test_a_chapter_that_is_missing_is_told(self, tmp_path: Path) -> None:
        data = epub({"a.xhtml": "<p>text</p>", "b.xhtml": "<p>more</p>"}).replace(b"OEBPS/b.xhtml", b"OEBPS/c.xhtml")
        assert told(tmp_path, "a.epub", data) == "it is not whole: its archive has no 'OEBPS/b.xhtml'"

    @pytest.mark.parametrize("chapter", ["", "<p> </p>", "<img src='a.png'/>"])
    def test_one_without_text_is_told(self, tmp_path: Path, chapter: str) -> None:
        assert "its text is empty: none of its 1 chapters" in told(tmp_path, "a.epub", epub({"a.xhtml": chapter}))

    def test_entities_reach_no_file_and_do_not_multiply(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        levels = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
        page = (
            f'<!DOCTYPE html [<!ENTITY l0 "ha">{levels}<!ENTITY file SYSTEM "file://{tmp_path}/secret">]>'
            "<html><body><p>text &l11; &file;</p></body></html>"
        )
        found = text(tmp_path, "a.epub", epub({"a.xhtml": page.encode()}))
        assert "secret" not in found.replace("&file;", "")
        assert len(found) < 200


class TestHtml:
    def test_what_a_reader_sees(self, tmp_path: Path) -> None:
        page = """<html><head><title>T</title><style>p {}</style><script>alert(1)</script></head><body>
            <nav><a href="/">Home</a></nav><h1>Heading</h1><p>A <b>bold</b>
            line &amp; <a href="x">link</a>.</p><ul><li>one</li><li>two</li></ul>
            <table><tr><th>Year</th><th>Sales</th></tr><tr><td>2025</td><td>1</td></tr></table>
            <p hidden>hidden</p><p onclick="alert(2)">last</p><script>document.write("x")</script>
            <!-- comment --><noscript>enable it</noscript></body></html>"""
        lines = [line.split() for line in text(tmp_path, "a.html", page.encode()).splitlines() if line.strip()]
        assert lines == [
            ["Heading"], ["A", "bold", "line", "&", "link."], ["*", "one"], ["*", "two"], ["Year", "Sales"],
            ["2025", "1"], ["last"],
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("head", "encoding"),
        [
            ('<meta charset="cp1252">', "cp1252"),
            ('<meta charset="iso-8859-1">', "cp1252"),
            ('<meta charset="Shift_JIS">', "cp932"),
            ('<meta charset="gb2312">', "gb18030"),
            ('<meta charset="euc-kr">', "cp949"),
            ("<meta http-equiv='Content-Type' content='text/html; charset=Shift_JIS'>", "shift_jis"),
            ('<?xml version="1.0" encoding="koi8-r"?>', "koi8-r"),
            ("", "utf-16"),
            ("", "utf-8"),
        ],
    )
    def test_the_encoding_that_it_declares(self, tmp_path: Path, head: str, encoding: str) -> None:
        word = {
            "cp1252": "“caf\xe9”", "shift_jis": "日本", "koi8-r": "слово", "cp932": "①髙", "gb18030": "朱镕基",
            "cp949": "똠방",
        }.get(encoding, "“é日”")  # fmt: skip
        page = f"{head}<html><body><p>{word}</p></body></html>"
        assert text(tmp_path, "a.html", page.encode(encoding)) == word

    def test_one_that_declares_none_is_read_as_asked_for(self, tmp_path: Path) -> None:
        page = ("<p>Le caf\xe9 est ferm\xe9 ce matin, mais la biblioth\xe8que est ouverte.</p>" * 3).encode("cp1252")
        error = told(tmp_path, "a.html", page)
        assert error.startswith("invalid UTF-8 at byte 9")
        assert error.endswith("it looks like cp1252: give --encoding cp1252 if it is")
        assert "café" in text(tmp_path, "a.html", page, encoding="cp1252")

    def test_what_stands_on_lines_of_its_own_stays_there(self, tmp_path: Path) -> None:
        page = (
            "<dl><dt>term</dt><dd>what it is</dd><dt>other</dt><dd>more<dl><dt>inner</dt><dd>last</dd></dl></dd></dl>"
            "<section>one</section><section>two</section><details><summary>short</summary>long</details>"
            "<select><option>a</option><option>b</option></select><button>Edit</button><button>Delete</button>"
        )
        assert text(tmp_path, "a.html", page.encode()).splitlines() == [
            "term", "    what it is", "other", "    more", "    inner", "        last", "one", "two", "short", "long",
            "a", "b", "Edit Delete",
        ]  # fmt: skip

    def test_a_row_of_a_table_begins_on_its_first_line(self, tmp_path: Path) -> None:
        page = b"<table><tr><th>Item<td>first line<br>second line<br>third line<td>9.50</table>"
        lines = text(tmp_path, "a.html", page).splitlines()
        assert lines[0].split() == ["Item", "first", "line", "9.50"]
        assert [line.split() for line in lines[1:]] == [["second", "line"], ["third", "line"]]

    def test_numbers_of_a_list_begin_where_it_says(self, tmp_path: Path) -> None:
        page = b"<ol start=7><li>a<li>b</ol><ol start=7><li value=9>c</ol><ol><li>d</ol>"
        assert text(tmp_path, "a.html", page).split() == ["7.", "a", "8.", "b", "9.", "c", "1.", "d"]

    def test_soft_hyphens_divide_no_words(self, tmp_path: Path) -> None:
        assert text(tmp_path, "a.html", b"<p>in&shy;vis&#173;ible") == "invisible"

    def test_deep_nesting_loses_nothing_without_a_word(self, tmp_path: Path) -> None:
        def nested(depth: int) -> bytes:
            return f"<html><body>{'<div>' * depth}inside{'</div>' * depth}<p>after</p></body></html>".encode()

        found = text(tmp_path, "a.html", nested(300))
        assert found.split() == ["inside", "after"]
        assert not found.startswith(" ")
        for depth in (3_000, 200_000):
            assert told(tmp_path, "a.html", nested(depth)) == "its elements are nested too deeply"

    def test_preformatted_lines_stay_lines(self, tmp_path: Path) -> None:
        page = b"<p>Run</p><pre><code><b>def</b> f():<br/>    <i>return</i>  1\n</code></pre><p>a <code>b</code></p>"
        found = text(tmp_path, "a.html", page)
        assert [line for line in found.splitlines() if line] == ["Run", "def f():", "    return  1", "a b"]

    @pytest.mark.parametrize("page", [b"", b" \n", b"<html><body></body></html>", b"<script>x</script>", b"<!-- x -->"])
    def test_one_without_text_is_told(self, tmp_path: Path, page: bytes) -> None:
        assert "is empty" in told(tmp_path, "a.html", page)


@pytest.mark.parametrize("kind", ["docx", "epub"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, kind: str) -> None:
    big = b"<p>" + b" " * (300 << 20)
    data = epub({"a.xhtml": big}) if kind == "epub" else docx(paragraph("t"), {"word/footnotes.xml": big})
    assert len(data) < 1 << 20
    error = told(tmp_path, f"a.{kind}", data)
    assert error == "its archive unpacks to more than 268,435,456 bytes of text; no more are read"


@pytest.mark.parametrize("kind", ["docx", "epub"])
def test_an_archive_that_lies_about_its_size_is_refused(tmp_path: Path, kind: str) -> None:
    """The directory says 10 bytes; 300 MiB are there."""
    name = "OEBPS/a.xhtml" if kind == "epub" else "word/document.xml"
    big = b"<p>" + b" " * (300 << 20)
    data = bytearray(epub({"a.xhtml": big}) if kind == "epub" else docx("", {name: big}))
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    data[place + 24 : place + 28] = struct.pack("<I", 10)
    error = told(tmp_path, f"a.{kind}", bytes(data), conversion_memory=0.25)
    assert "Bad CRC-32" in error or "needs more than 0.25 GiB" in error


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.epub", "a.html"])
def test_the_same_bytes_give_the_same_text(tmp_path: Path, name: str) -> None:
    data = {
        "a.pdf": pdf(["one\ntwo", "three"]),
        "a.docx": docx(paragraph("one") + table([["a", "b"]])),
        "a.epub": epub({"a.xhtml": "<p>one</p>"}),
        "a.html": b"<p>one<table><tr><td>a<td>b</table>",
    }[name]
    assert len({text(tmp_path, name, data) for _ in range(3)}) == 1


def test_results_and_their_pages_in_the_folder_of_the_input_are_no_documents(tmp_path: Path, model: Path) -> None:
    names = ["a.html", "out/part-000000-0a1b2c3d.parquet", "out/report.html", "out/comparison.html", "sub/report.html"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<p>text</p>")
    survey = survey_input(JobConfig(input=(str(tmp_path),), output=str(tmp_path / "out"), model=str(model)))
    assert survey.catalogue.ids.to_pylist() == ["a.html", "sub/report.html"]


def test_listing_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pdf", "b.docx", "c.html", "d.epub", "e.htm"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(converted, "whole_file", None)
    monkeypatch.setattr(converted, "shared_converters", None)
    catalogue = list_documents(find_files((str(tmp_path),))[0])
    assert catalogue.ids.to_pylist() == ["a.pdf", "b.docx", "c.html", "d.epub", "e.htm"]


def test_a_file_that_is_too_large_is_not_given_to_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "MOST_BYTES", 100)
    (tmp_path / "a.pdf").write_bytes(bytes(101))
    (tmp_path / "b.txt").write_text("fine")
    document = list_documents(find_files((str(tmp_path),))[0]).document(0)
    assert document.error == "the file has 101 bytes; at most 100 are converted"


def test_a_package_that_is_missing_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    files = find_files((str(tmp_path),))[0]
    real = converted.importlib.util.find_spec
    monkeypatch.setattr(converted.importlib.util, "find_spec", lambda name: None if name == "pypdfium2" else real(name))
    with pytest.raises(
        JobError, match=r"the package pypdfium2, which is not installed: pip install 'stemline\[documents\]'"
    ):
        list_documents(files)


def test_a_file_that_hangs_holds_up_no_other_document(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the worker of a job: its limits go to the converters, and texts and other files pass the file by."""
    fake = Format(
        "fake", (".fake",), converted.list_whole_file, partial(converted.ConvertingReader, "fake_converter"),
        has_columns=False, is_converted=True,
    )  # fmt: skip
    monkeypatch.setitem(FORMATS, "fake", fake)
    monkeypatch.setitem(SUFFIXES, ".fake", fake)
    (tmp_path / "a.fake").write_text("sleep 3600")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
        (tmp_path / f"{number}.pdf").write_bytes(pdf([f"page {number}", None, "more"]))
    limit = patient(4.0)
    table = summarize(
        input=tmp_path, model=model, engine_factory="fake_engine:FakeEngine", max_new_tokens=8,
        conversion_seconds=limit,
    )  # fmt: skip
    rows = {row["document_id"]: row for row in table.to_pylist()}
    slow = rows.pop("a.fake")
    assert slow["status"] == "error"
    assert slow["error"].startswith(f"it was not converted within {limit:g} s")
    assert slow["total_seconds"] >= limit
    assert {row["status"] for row in rows.values()} == {"ok"}
    for name, row in rows.items():
        assert row["total_seconds"] < limit, "it did not wait for the one that hangs"
        assert row["page_starts"] == ([0, 8, 10] if name.endswith("pdf") else None)
        assert row["input_note"] == (
            "1 of 3 pages hold pictures and no text; "
            "if they are scans, run OCR first: ocrmypdf --skip-text IN.pdf OUT.pdf"
            if name.endswith("pdf")
            else None
        )


class TestEncoding:
    def test_a_text_file_is_read_as_declared(self, tmp_path: Path) -> None:
        french = "Le café est fermé ce matin, mais la bibliothèque reste ouverte à tous les élèves. " * 2
        for encoding in ("cp1252", "utf-16", "shift_jis"):
            words = "図書館は閉まっている" if encoding == "shift_jis" else french
            assert text(tmp_path, "a.txt", words.encode(encoding), encoding=encoding) == words
        error = told(tmp_path, "a.txt", french.encode("cp1252"))
        assert error.startswith("invalid UTF-8 at byte 6: invalid continuation byte")
        assert error.endswith("; it looks like cp1252: give --encoding cp1252 if it is")
        assert "give --encoding utf-16" in told(tmp_path, "a.txt", french.encode("utf-16"))
        assert "invalid ascii at byte 6" in told(tmp_path, "a.txt", french.encode("cp1252"), encoding="ascii")

    @pytest.mark.parametrize("encoding", ["cp1252", "gb18030"])
    def test_csv_is_read_as_declared(self, tmp_path: Path, encoding: str) -> None:
        words = {"cp1252": "“fermé”", "gb18030": "图书馆,关门"}[encoding]
        path = tmp_path / "a.csv"
        path.write_bytes(f'id,text,clé\r\n1,"{words}",é\r\n2,more,à\r\n'.encode(encoding))
        settings = ReadSettings(encoding=encoding)
        catalogue = list_documents(find_files((str(path),))[0], keep_columns=("clé",), settings=settings)
        reader = DocumentReader("text", catalogue.kept, settings)
        found = {document.document_id: reader.read(document) for document in catalogue.documents()}
        assert {name: read_text for name, (read_text, _) in found.items()} == {"1": words, "2": "more"}
        assert found["2"][1].columns["clé"].to_pylist() == ["à"]

    def test_csv_in_utf_16_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("id,text\n1,x\n".encode("utf-16"))
        with pytest.raises(JobError, match="lines cannot be told apart in utf-16; save it as UTF-8"):
            list_documents(find_files((str(tmp_path),))[0], settings=ReadSettings(encoding="utf-16"))

    def test_the_setting_is_checked_and_part_of_the_job(self, model: Path) -> None:
        def config(**more: Any) -> JobConfig:
            return JobConfig(input=("a",), output="b", model=str(model), **more)

        assert config(encoding="CP1252").encoding == "cp1252"
        assert config(encoding="UTF8").fingerprint() == config().fingerprint() != config(encoding="l1").fingerprint()
        for wrong in ("nonsense", "hex", "", 5):
            with pytest.raises(JobError, match="--encoding must be an encoding that Python knows, like cp1252"):
                config(encoding=wrong)


def test_a_data_set_of_hugging_face_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the filesystem of huggingface_hub that pyarrow opens; here one with its paths, on this machine."""
    data = tmp_path / "datasets" / "org" / "name" / "data"
    data.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["one", "two"]}), data / "train-0.parquet")
    (data / "test.jsonl").write_text('{"id": "c", "text": "three"}\n')
    (data / "page.html").write_text("<p>four")

    class Store(DirFileSystem):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(str(tmp_path), LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("hf://")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Store)
    _opened.cache_clear()
    found = {}
    for place in ("hf://datasets/org/name", "hf://datasets/org/name/data/train-*.parquet"):
        catalogue = list_documents(find_files((place,))[0])
        reader = DocumentReader("text", [])
        found[place] = {document.document_id: reader.read(document)[0] for document in catalogue.documents()}
        assert catalogue.document(0).source.startswith("hf://datasets/org/name/data/")
    _opened.cache_clear()
    whole, some = found.values()
    assert some == {"a": "one", "b": "two"}
    assert whole == some | {"c": "three", "data/page.html": "four"}
