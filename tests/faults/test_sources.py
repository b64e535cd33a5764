"""Sources that change, break off, or are made to harm: every document is told of, none takes another's place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import DocumentError, JobError
from pipeline.imports import ROOT
from pipeline.source import Catalogue, DocumentReader, find_files, list_documents, streams

ROWS: list[dict[str, Any]] = [{"id": f"d{i}", "text": f"text {i}"} for i in range(4)]
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def listed(folder: Path, **options: Any) -> Catalogue:
    return list_documents(find_files((str(folder),))[0], **options)


def told(catalogue: Catalogue) -> dict[str, str]:
    """By id, the text or what is wrong with it."""
    reader, found = DocumentReader("text", catalogue.kept), {}
    for position in range(len(catalogue)):
        document = catalogue.document(position)
        try:
            found[document.document_id] = document.error or reader.read(document)[0]
        except DocumentError as error:
            found[document.document_id] = str(error)
    return found


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        form, _, packed = kind.partition(".")
        lines = [",".join(map(str, row.values())) for row in [{name: name for name in rows[0]}, *rows]]
        data = "\n".join(lines if form == "csv" else map(json.dumps, rows)).encode() + b"\n"
        path.write_bytes(PACK[packed](data))
    return path


@pytest.mark.parametrize("id_column", [None, "name"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.zst"])
def test_a_document_never_gets_the_text_of_another_that_took_its_place(
    tmp_path: Path, kind: str, id_column: str | None
) -> None:
    rows = [{"id": 7, "name": row["id"], "text": row["text"]} for row in ROWS] if id_column else ROWS
    write(tmp_path, kind, rows)
    catalogue = listed(tmp_path, id_column=id_column)
    assert told(catalogue) == {row["id"]: row["text"] for row in ROWS}
    write(tmp_path, kind, rows[1:2] + rows[:1] + rows[2:])  # while the job runs
    found = told(catalogue)
    assert found["d0"] == "its file was written to after it was listed: 'd1' stands in its place; run the job again"
    assert "'d0' stands in its place" in found["d1"]
    assert (found["d2"], found["d3"]) == ("text 2", "text 3")
    write(tmp_path, kind, [row | {"text": 5 * row["text"]} for row in rows] if kind in ("jsonl", "csv") else rows[:1])
    assert not {"text 1", "text 2", "text 3"} & set(told(catalogue).values())


def test_rows_without_ids_are_known_by_their_place_alone(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [{"text": "one"}, {"text": "two"}])
    assert list(told(listed(tmp_path)).values()) == ["one", "two"]


def flushed(data: bytes) -> bytes:
    """The beginning of a zstd frame that holds `data`, cut off at the end of a block."""
    packer = zstandard.ZstdCompressor().compressobj()
    return packer.compress(data) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("cut", [1, 5])
def test_an_archive_that_was_cut_off_is_told_and_what_is_before_is_read(tmp_path: Path, kind: str, cut: int) -> None:
    pack = PACK[kind]
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(pack(lines[0] + lines[1]) + pack(lines[2])[:-cut])
    found = told(listed(tmp_path))
    assert found["d0"] == "text 0"
    assert found["d1"] == "text 1"
    (error,) = [text for name, text in found.items() if name.startswith(path.name)]
    assert "the file breaks off after line" in error
    path.write_bytes(b"".join(pack(line) for line in lines))
    assert told(listed(tmp_path)) == {row["id"]: row["text"] for row in ROWS}


def test_an_archive_that_was_cut_off_between_two_lines_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(flushed(json.dumps(ROWS[0]).encode() + b"\n"))
    error = "the file breaks off after line 1: the compressed data ends too early"
    assert told(listed(tmp_path)) == {"d0": "text 0", "a.jsonl.zst:2": error}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_larger_than_memory_costs_one_row(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    real = streams.lines

    def lines(stream: Any) -> Any:
        nonlocal largest
        for line, length in real(stream):
            largest = max(largest, len(line))
            yield line, length

    monkeypatch.setattr(streams, "MOST_BYTES", 5000)
    monkeypatch.setattr("pipeline.source.jsonl.lines", lines)
    write(
        tmp_path, kind, [ROWS[0], {"id": "bomb", "text": "x" * 3_000_000}, ROWS[1], {"id": "half", "text": "y" * 4000}]
    )
    found = told(listed(tmp_path))
    assert [found["d0"], found["d1"], found["half"]] == ["text 0", "text 1", "y" * 4000]
    assert found[f"a.{kind}:2"].startswith("line 2: it has 3,000,0")
    assert largest == 5000


def test_a_text_that_is_too_large_is_not_given_to_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.source.catalogue.MOST_BYTES", 5000)
    (tmp_path / "a.txt").write_text("x" * 5001)
    (tmp_path / "b.txt").write_text("y" * 5000)
    write(tmp_path, "parquet", [{"id": "p", "text": "z" * 5001}])
    found = told(listed(tmp_path))
    error = "its text has 5,001 bytes; at most 5,000 are read"
    assert found == {"a.txt": error, "b.txt": "y" * 5000, "p": error}


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    """Two links, since a walk that only bounds the depth would take 2 ** 40 steps."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "one" / "up").symlink_to(tmp_path)
    (tmp_path / "one" / "self").symlink_to(tmp_path / "one")
    (tmp_path / "two" / "other").symlink_to(tmp_path / "one")
    assert told(listed(tmp_path)) == {"one/a.txt": "one", "two/a.txt": "two", "two/other/a.txt": "one"}


def test_names_that_nothing_can_open_have_rows(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "line\nbreak.txt").write_text("fine too")
    (tmp_path / "nowhere.txt").symlink_to("/nothing/there")
    (tmp_path / "itself.md").symlink_to(tmp_path / "itself.md")
    os.mkfifo(tmp_path / "pipe.txt")
    folder = os.fsencode(tmp_path)
    Path(os.fsdecode(folder + b"/\xff.txt")).write_text("x")
    Path(os.fsdecode(folder + b"/d\xfe")).mkdir()
    Path(os.fsdecode(folder + b"/d\xfe/x.parquet")).write_text("x")
    found = told(listed(tmp_path))
    assert found.pop("good.txt") == "fine"
    assert found.pop("line\nbreak.txt") == "fine too"
    assert sorted(found) == ["\\udcff.txt", "d\\udcfe/x.parquet", "itself.md", "nowhere.txt"]
    assert all("open" in error and "\n" not in error for error in found.values())


def test_a_folder_of_links_to_nothing_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/nothing/there")
    with pytest.raises(JobError, match="no input file can be read"):
        listed(tmp_path)


EVERY_FOOTER = """
import sys
from pathlib import Path
from pipeline.errors import DocumentError, JobError
from pipeline.source import DocumentReader, find_files, list_documents

folder = Path(sys.argv[1])
path, reader = folder / "a.parquet", DocumentReader("text", [])
whole = path.read_bytes()
for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
    path.write_bytes(whole[:place] + b"\\0" + whole[place + 1 :])
    try:
        catalogue = list_documents(find_files((str(folder),))[0])
    except JobError:
        continue
    for position in range(len(catalogue)):
        document = catalogue.document(position)
        try:
            assert document.error or reader.read(document)
        except DocumentError:
            pass
"""


def test_no_damaged_footer_ends_the_process(tmp_path: Path) -> None:
    """As some of pyarrow's look-ups in one do: they abort, which nothing can catch."""
    write(tmp_path, "parquet", ROWS[:2])
    (tmp_path / "good.txt").write_text("fine")
    told = subprocess.run([sys.executable, "-c", EVERY_FOOTER, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
