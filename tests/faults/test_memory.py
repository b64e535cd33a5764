"""Small files that come to more than a machine's memory: the driver and a worker need a bounded part of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import DocumentError
from pipeline.imports import ROOT
from pipeline.job.dry_run import describe_plan
from pipeline.settings.config import JobConfig
from pipeline.source import Document, DocumentReader, find_files, list_documents, parquet, streams

MIB = 1 << 20
# Prints how far above its imports a process goes, in MiB, when it lists a folder and reads its first and last document.
MEASURE = """
import contextlib, sys
from pathlib import Path
from pipeline.errors import DocumentError
from pipeline.source import DocumentReader, find_files, list_documents

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

before = peak()
catalogue = list_documents(find_files((sys.argv[1],))[0], keep_columns=("kept",))
reader = DocumentReader("text", catalogue.kept)
for position in (0, len(catalogue) - 1):
    with contextlib.suppress(DocumentError):
        reader.read(catalogue.document(position))
print(peak() - before)
"""


def used(folder: Path) -> int:
    told = subprocess.run([sys.executable, "-c", MEASURE, folder], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return int(told.stdout.split()[-1])


def bomb(rows: int, size: int) -> pa.Table:
    """A table that is small on disk and holds a text of `size` bytes `rows` times."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
    return pa.table({"id": pa.array(range(rows)), "text": texts, "kept": texts})


def test_a_text_that_thousands_of_rows_refer_to_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(bomb(20_000, 4 * MIB), path, compression="zstd")
    assert path.stat().st_size < 100_000
    assert used(tmp_path) < 200  # all texts together have 80,000 MiB


def test_ids_that_are_one_text_are_held_once(tmp_path: Path) -> None:
    table = bomb(20_000, 4 * MIB)
    pq.write_table(pa.table({"id": table["text"], "text": ["x"] * 20_000}), tmp_path / "a.parquet", compression="zstd")
    catalogue = list_documents(find_files((str(tmp_path),))[0])
    assert len(catalogue.errors) == 20_000
    assert "its id (id) is of 4,194,304 characters (at most 65,536)" in catalogue.errors[0]


def test_a_dry_run_does_not_read_what_the_listing_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_BYTES", 5000)
    lines = [{"id": "fine", "text": "fine and good"}, {"id": "bomb", "text": "x" * 3_000_000}]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data))
    seen = []
    real = DocumentReader.read

    def read(reader: DocumentReader, document: Document) -> Any:
        seen.append(document.document_id)
        return real(reader, document)

    monkeypatch.setattr(DocumentReader, "read", read)
    config = JobConfig(input=(str(tmp_path),), output=str(tmp_path / "out"), model=str(model))
    told = "\n".join(describe_plan(config))
    assert seen == ["fine"]
    assert "unreadable: 1 documents get an error row at once" in told


def test_rows_of_a_large_row_group_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 50_000)
    rows = [{"id": f"d{i:03}", "text": f"text {i} " * 200, "kept": i} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    catalogue = list_documents(find_files((str(tmp_path),))[0], keep_columns=("kept",))
    assert catalogue.ids.to_pylist() == [row["id"] for row in rows]
    reader = DocumentReader("text", catalogue.kept)
    for position in (5, 6, 99, 0, 50, 50, 49):  # on, and back
        text, kept = reader.read(catalogue.document(position))
        assert text == rows[position]["text"]
        assert kept.columns["kept"][0].as_py() == position
    assert not reader._readers["parquet"]._groups  # type: ignore[attr-defined]
    pq.write_table(pa.Table.from_pylist(rows[:90]), tmp_path / "a.parquet")
    with pytest.raises(DocumentError, match="the file has fewer rows than when it was listed"):
        DocumentReader("text", []).read(catalogue.document(99))


def test_a_line_that_grew_since_it_was_listed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": "x" * 5000}) + "\n")
    (tmp_path / "b.txt").write_text("x" * 5000)
    catalogue = list_documents(find_files((str(tmp_path),))[0])
    monkeypatch.setattr("pipeline.source.streams.MOST_BYTES", 1000)
    monkeypatch.setattr("pipeline.source.text_files.MOST_BYTES", 1000)
    for position in (0, 1):
        with pytest.raises(DocumentError, match=r"1,000 (bytes|are read)"):
            DocumentReader("text", []).read(catalogue.document(position))
