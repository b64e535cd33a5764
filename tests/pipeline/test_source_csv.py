"""CSV and TSV: what a record is, what breaks one, and which types its fields have in the results."""

from __future__ import annotations

import csv
import gzip
import io
import random
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DocumentError, JobError
from pipeline.source import Catalogue, DocumentReader, csv_files, find_files, list_documents


def listed(folder: Path, **options: Any) -> Catalogue:
    return list_documents(find_files((str(folder),))[0], **options)


def told(catalogue: Catalogue, text_column: str = "text") -> dict[str, str]:
    """By id, the text or what is wrong with it."""
    reader, found = DocumentReader(text_column, catalogue.kept), {}
    for position in range(len(catalogue)):
        document = catalogue.document(position)
        try:
            found[document.document_id] = document.error or reader.read(document)[0]
        except DocumentError as error:
            found[document.document_id] = str(error)
    return found


def kept(catalogue: Catalogue, name: str) -> list[Any]:
    """A kept column, in the order of the input."""
    reader = DocumentReader("text", catalogue.kept)
    found = [reader.read(catalogue.document(position))[1] for position in range(len(catalogue))]
    assert not any(item.problem for item in found)
    return [item.columns[name][0].as_py() for item in found]


def test_whatever_a_field_holds_comes_back(tmp_path: Path) -> None:
    """Written by Python's csv module, in every style of quotes and ends of lines."""
    chance = random.Random(0)
    pieces = ["word", '"', "\n", "\r\n", "\r", ",", "\t", "é", "\U0001f600", " ", ";", "'", "\u2028", "\x0b", "\\"]
    texts = {f"d{i}": "x" + "".join(chance.choices(pieces, k=chance.randrange(1, 30))) for i in range(60)}
    for suffix, separator in ((".csv", ","), (".tsv", "\t"), (".csv.gz", ",")):
        for number, (quoting, end) in enumerate(((csv.QUOTE_ALL, "\n"), (csv.QUOTE_MINIMAL, "\r\n"))):
            out = io.StringIO(newline="")
            writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
            writer.writerows([("id", "text", "n"), *((*row, i) for i, row in enumerate(texts.items()))])
            folder = tmp_path / f"{number}{suffix}"
            folder.mkdir()
            data = b"\xef\xbb\xbf" * number + out.getvalue().encode()
            (folder / f"a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
            assert told(listed(folder)) == texts, (suffix, number)


def test_broken_records_cost_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'id,text\na,"one\ntwo"\n\nb\nc,x,y\n"d"e,x\nf,caf\xe9\n,x\ng,\nh,fine\ni,"never\nclosed\n'
    )
    catalogue = listed(tmp_path)
    found = told(catalogue)
    assert found == {
        "a": "one\ntwo",
        "a.csv:5": "line 5: it has 1 fields, expected 2 as in the first line",
        "a.csv:6": "line 6: it has 3 fields, expected 2 as in the first line",
        "a.csv:7": "line 7: broken CSV: ',' expected after '\"'; quotes in a field are doubled",
        "a.csv:8": "line 8: invalid UTF-8 at byte 5: invalid continuation byte; save the text as UTF-8, or name its "
        "encoding with --encoding",
        "a.csv:9": "line 9: its id (id) is empty, expected text or a number",
        "g": "its text is empty (0 bytes)",
        "h": "fine",
        "a.csv:12": "lines 12 to 13: a quote opens a field, and none closes it before the file ends",
    }
    assert catalogue.document(0).source.endswith("a.csv line 2")


def test_large_fields_are_read_and_those_that_are_too_large_cost_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * 3_000_000
    (tmp_path / "a.csv").write_text(f'id,text\na,"{text}\n{text}"\nb,{text}\n')
    assert told(listed(tmp_path)) == {"a": f"{text}\n{text}", "b": text}
    monkeypatch.setattr("pipeline.source.streams.MOST_BYTES", 1000)
    monkeypatch.setattr("pipeline.source.csv_files.MOST_BYTES", 1000)
    rows = "".join(f"row{i},fine\n" for i in range(200))
    (tmp_path / "a.csv").write_text(f'id,text\na,"{text}"\nb,fine\nc,"{rows}')
    found = told(listed(tmp_path))
    error = "it has more than 1,000 bytes, no more are read; is there a quote that none closes?"
    assert found["a.csv:2"] == f"line 2: {error}"
    assert found["b"] == "fine"
    (lost,) = [name for name in found if name == "a.csv:4"]
    assert found[lost].endswith(error), "the lines that it took along are named"
    assert found[lost].startswith("lines 4 to ")
    first = int(found[lost].split()[3].rstrip(":")) - 3  # the row behind the last line that is lost
    assert [name for name in found if name.startswith("row")] == [f"row{i}" for i in range(first, 200)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1,a long text\n2,another\n", r"text: no file or line of the input has it; found: 1, a long text"),
        (b"id;text\n1;x\n", r"its columns are not separated by commas \(in \.tsv: tabs\): 'id;text'"),
        (b"id\ttext\n1\tx\n", r"its columns are not separated by commas"),
        (b"text,text\n1,x\n", "it has 2 columns of the name 'text'; rename them"),
        (b"id,id,text\n1,2,x\n", "it has 2 columns of the name 'id'; rename them"),
        (b"i\xe9,text\n1,x\n", "invalid UTF-8 at byte 1"),
        ("id,text\n1,x\n".encode("utf-16"), "its text is UTF-16; save it as UTF-8: iconv"),
        (b'id,"text\n1,x\n', "a quote opens a field, and none closes it"),
        (b"x" * 2_000_000, "its first line has 2,000,000 bytes; it must name the columns"),
        (b"", "holds no documents"),
        (b"id,text\n", "holds no documents"),
        (b"\n \n", "holds no documents"),
    ],
)
def test_a_first_line_that_does_not_name_the_columns_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(JobError, match=message):
        listed(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"id": "b", "text": "fine"}\n')
    assert told(listed(tmp_path))["b"] == "fine", "one file costs no other its documents"


def test_kept_columns_have_the_types_of_their_fields(tmp_path: Path) -> None:
    columns = {
        "whole": (["1", "-20", ""], [1, -20, None]),
        "real": (["1", "2.5e3", ""], [1.0, 2500.0, None]),
        "truth": (["true", "False", ""], [True, False, None]),
        "day": (["2024-02-29", "1999-01-01", ""], [date(2024, 2, 29), date(1999, 1, 1), None]),
        "time": (["2024-02-29 10:00:00", "2024-02-29T10:00:01", ""], [datetime(2024, 2, 29, 10, 0, i) for i in (0, 1)]),
        "code": (["01234", "99999", ""], ["01234", "99999", None]),
        "long": (["123456789012345678901", "0.5", ""], ["123456789012345678901", "0.5", None]),
        "mixed": (["1", "x", ""], ["1", "x", None]),
        "flags": (["1", "true", ""], ["1", "true", None]),
        "none": (["", "", ""], [None, None, None]),
    }
    rows = zip(*(fields for fields, _ in columns.values()), strict=True)
    lines = [["id", "text", *columns], *([str(i), "x", *row] for i, row in enumerate(rows))]
    (tmp_path / "a.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    catalogue = listed(tmp_path, keep_columns=tuple(columns))
    for name, (_, expected) in columns.items():
        assert kept(catalogue, name) == [*expected, None][:3], name


def test_types_are_those_of_all_fields_and_not_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "_TOGETHER", 3)
    fields = ["1", "2", "3", "4", "5.5", "6", "7", "8"]
    for last, kind in (("9", pa.float64()), ("nine", pa.string()), ("9" * 50, pa.string())):
        rows = "".join(f"{i},x,{field}\n" for i, field in enumerate([*fields, last]))
        (tmp_path / "a.csv").write_text("id,text,n\n" + rows)
        catalogue = listed(tmp_path, keep_columns=("n",))
        assert catalogue.kept[0].type == kind
        assert kept(catalogue, "n") == [*fields, last] if kind == pa.string() else [*map(float, [*fields, last])]


def test_a_column_beside_those_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,n,n2\na,x,5,5\n")
    pq.write_table(pa.table({"id": ["b"], "text": ["x"], "n": [0.5], "n2": ["five"]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"id": "c", "text": "x", "n": 7, "n2": 7}\n')
    catalogue = listed(tmp_path, keep_columns=("n", "n2"))
    assert kept(catalogue, "n") == [5.0, 0.5, 7.0]
    assert kept(catalogue, "n2") == ["5", "five", "7"]


def test_a_file_that_changed_since_it_was_listed_gives_no_other_documents_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\na,one\nb,two\n")
    catalogue = listed(tmp_path)
    for content in ("id,text\nb,two\na,one\n", "id,text\n", "id,more,text\na,1,one\n", 'id,text\n"a,one\nb,two\n'):
        (tmp_path / "a.csv").write_text(content)
        assert not {"one", "two"} & set(told(catalogue).values()), content
