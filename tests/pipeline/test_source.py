"""Listing and reading of documents: kinds, ids, shards, and what is wrong with a document or an input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import DocumentError, JobError
from pipeline.results.kept_columns import Kept
from pipeline.source import Catalogue, DocumentReader, find_files, list_documents

ROWS = [{"id": f"d{i}", "text": f"text number {i} " * (i + 1), "year": 2000 + i, "tags": ["a", i]} for i in range(7)]


def listed(*inputs: Path | str, **options: Any) -> Catalogue:
    return list_documents(find_files(tuple(map(str, inputs)))[0], **options)


def read_all(catalogue: Catalogue, text_column: str = "text") -> dict[str, tuple[str, Kept]]:
    reader = DocumentReader(text_column, catalogue.kept)
    return {document.document_id: reader.read(document) for document in catalogue.documents()}


def value(kept: Kept, name: str) -> Any:
    return kept.columns[name][0].as_py()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"docs.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row | {"tags": "x"} for row in ROWS]), path, row_group_size=3)
    elif kind in ("csv", "tsv"):
        fields = [list(ROWS[0]), *([str(value) for value in row.values()] for row in ROWS)]
        quoted = ({"csv": ",", "tsv": "\t"}[kind].join(f'"{field}"' for field in line) + "\n" for line in fields)
        path.write_text("".join(quoted))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(ROWS)))
    elif kind == "jsonl.zst":
        frames = [zstandard.compress(lines(ROWS[:3])), zstandard.compress(lines(ROWS[3:]))]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(lines(ROWS))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "tsv"])
def test_every_kind_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    catalogue = listed(write(tmp_path, kind), keep_columns=("year",))
    found = read_all(catalogue)
    assert {name: text for name, (text, _) in found.items()} == {row["id"]: row["text"] for row in ROWS}
    assert {name: value(kept, "year") for name, (_, kept) in found.items()} == {row["id"]: row["year"] for row in ROWS}
    assert catalogue.kept[0].type == pa.int64()
    assert catalogue.total_bytes == sum(len(row["text"]) for row in ROWS)


def test_text_folder_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["a.txt", "b.md", "sub/c.txt", ".hidden.txt", "~$d.docx", "d.odt"]
    for name in names:
        (tmp_path / name).write_text(f"text of {name}")
    files, ignored = find_files((str(tmp_path),))
    assert [file.label for file in files] == ["a.txt", "b.md", "sub/c.txt"]
    assert ignored == ["d.odt"]
    assert [f.label for f in find_files((f"{tmp_path}/*.txt",))[0]] == ["a.txt"]
    assert [f.label for f in find_files((f"{tmp_path}/**/*.txt",))[0]] == ["a.txt", "sub/c.txt"]
    assert [f.label for f in find_files((f"{tmp_path}/[ab].*",))[0]] == ["a.txt", "b.md"]
    assert read_all(listed(tmp_path))["sub/c.txt"][0] == "text of sub/c.txt"


def test_ids_default_to_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes(lines([{"text": "a"}, {"text": "b"}]))
    pq.write_table(pa.table({"text": ["c", "d"]}), tmp_path / "p.parquet")
    pq.write_table(pa.table({"document_id": [7, 8], "text": ["e", "f"]}), tmp_path / "q.parquet")
    assert sorted(read_all(listed(tmp_path))) == ["7", "8", "l.jsonl:1", "l.jsonl:2", "p.parquet:0", "p.parquet:1"]


def test_broken_lines_are_documents_with_an_error_that_names_the_line(tmp_path: Path) -> None:
    good = lines([{"id": "good", "text": "fine"}])
    bad = [b"{broken\n", b'{"id": "x", "text": "\xff"}\n', b"[1]\n", b'{"id": null, "text": "t"}\n', b"\n"]
    (tmp_path / "l.jsonl").write_bytes(good + b"".join(bad) + lines([{"id": "last", "text": "also fine"}]))
    catalogue = listed(tmp_path / "l.jsonl")
    documents = {d.document_id: d for d in catalogue.documents()}
    assert [name for name, d in documents.items() if not d.error] == ["last", "good"]
    errors = {name: d.error for name, d in documents.items() if d.error}
    assert sorted(errors) == ["l.jsonl:2", "l.jsonl:3", "l.jsonl:4", "l.jsonl:5"]
    assert "line 2: broken JSON" in errors["l.jsonl:2"]
    assert "line 3: invalid UTF-8 at byte 21" in errors["l.jsonl:3"]
    assert "line 4: expected a JSON object, got list" in errors["l.jsonl:4"]
    assert "line 5: its id (id) is null" in errors["l.jsonl:5"]
    reader = DocumentReader("text", [])
    assert reader.read(documents["last"])[0] == "also fine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"  \n ", "blank"),
        (b"good until \xff here", "invalid UTF-8 at byte 11"),
    ],
)
def test_bad_text_files_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    document = listed(tmp_path).document(0)
    with pytest.raises(DocumentError, match=message):
        DocumentReader("text", []).read(document)


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "null"), (5, "int, expected a string"), ("", "0 bytes"), ("a\ud800b", "lone surrogate at character 1")],
)
def test_bad_json_texts_say_what_is_wrong(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "l.jsonl").write_bytes(lines([{"id": "a", "text": value}]))
    with pytest.raises(DocumentError, match=message):
        DocumentReader("text", []).read(listed(tmp_path).document(0))


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"not \xff fine", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": texts}), tmp_path / "p.parquet")
    catalogue = listed(tmp_path)
    documents = {d.document_id: d for d in catalogue.documents()}
    reader = DocumentReader("text", [])
    assert reader.read(documents["a"])[0] == "fine"
    with pytest.raises(DocumentError, match="invalid UTF-8 at byte 4"):
        reader.read(documents["b"])
    with pytest.raises(DocumentError, match="null"):
        reader.read(documents["c"])


def test_duplicate_ids_are_refused_with_ids_and_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": "x", "text": "1"}, {"id": "y", "text": "2"}]))
    (tmp_path / "b.jsonl").write_bytes(lines([{"id": "z", "text": "3"}, {"id": "x", "text": "4"}]))
    with pytest.raises(JobError, match=r"'x' \(.*a\.jsonl line 1, .*b\.jsonl line 2\)") as raised:
        listed(tmp_path)
    assert "'y'" not in str(raised.value)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_files_of_one_name_in_two_folders_are_told_what_helps(tmp_path: Path, kind: str) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        if kind == "parquet":
            pq.write_table(pa.table({"text": [folder]}), tmp_path / folder / "a.parquet")
        elif kind == "jsonl":
            (tmp_path / folder / "a.jsonl").write_bytes(lines([{"text": folder}]))
        else:
            (tmp_path / folder / "a.txt").write_text(folder)
    with pytest.raises(JobError, match="have the same name in several inputs: give the folder above them") as told:
        listed(tmp_path / "x", tmp_path / "y")
    assert "--id-column" not in str(told.value)
    assert sorted(text for text, _ in read_all(listed(tmp_path)).values()) == ["x", "y"], "which is what it says"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_id_column_that_repeats_can_be_switched_off(tmp_path: Path, kind: str) -> None:
    rows = [{"id": "same", "text": "one"}, {"id": "same", "text": "two"}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_bytes(lines(rows))
    with pytest.raises(JobError, match="or give --id-column '' for ids of file name and row"):
        listed(tmp_path)
    found = {name: text for name, (text, _) in read_all(listed(tmp_path, id_column="")).items()}
    first = 0 if kind == "parquet" else 1
    assert found == {f"a.{kind}:{first}": "one", f"a.{kind}:{first + 1}": "two"}


def test_a_file_that_two_inputs_name_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    files, _ = find_files((str(tmp_path), str(tmp_path / "sub"), f"{tmp_path}/*.txt", f"file://{tmp_path}/b.txt"))
    assert [file.label for file in files] == ["b.txt", "sub/a.txt"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("option", ["text_column", "id_column", "keep_columns"])
def test_a_missing_column_names_those_that_are_there(tmp_path: Path, kind: str, option: str) -> None:
    path = write(tmp_path, kind)
    wanted = ("nope",) if option == "keep_columns" else "nope"
    with pytest.raises(JobError, match=r"nope.*found: id, text, year, tags"):
        listed(path, **{option: wanted})


def test_text_column_of_another_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(JobError, match="is int64, expected text"):
        listed(tmp_path)


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=f"does not exist: {tmp_path} holds no 'nothing'; give a file, a folder or a glob"
    ):
        find_files((str(tmp_path / "nothing"),))
    with pytest.raises(JobError, match=f"holds no .{tmp_path.name}_.; did you mean '{tmp_path.name}'"):
        find_files((f"{tmp_path}_/texts/a.txt",))
    with pytest.raises(JobError, match="no files"):
        find_files((str(tmp_path),))
    with pytest.raises(JobError, match="--input: a name is empty, as of a variable that is not set"):
        find_files(("",))
    (tmp_path / "a.odt").write_bytes(b"x")
    with pytest.raises(JobError, match=r"only files of other kinds \(a\.odt\)"):
        find_files((str(tmp_path),))
    with pytest.raises(JobError, match="no file matches"):
        find_files((f"{tmp_path}/*.txt",))
    (tmp_path / "e.jsonl").write_bytes(b"\n\n")
    with pytest.raises(JobError, match="no documents"):
        listed(tmp_path)


def test_damaged_files_cost_only_what_they_hold(tmp_path: Path) -> None:
    whole = gzip.compress(lines(ROWS))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 this is not parquet")
    (tmp_path / "fine.txt").write_text("fine")
    catalogue = listed(tmp_path)
    errors = {d.document_id: d.error for d in catalogue.documents() if d.error}
    assert "not a readable Parquet file" in errors["junk.parquet"]
    assert any("breaks off after line" in error for error in errors.values())
    assert "fine.txt" in catalogue.ids.to_pylist()
    (tmp_path / "fine.txt").unlink()
    (tmp_path / "cut.jsonl.gz").unlink()
    with pytest.raises(JobError, match="no input file can be read"):
        listed(tmp_path)


def test_shards_share_the_documents_out(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes(lines([{"id": f"doc {i}", "text": "t"} for i in range(200)]))
    shares = [set(listed(tmp_path, shard=(i, 3)).ids.to_pylist()) for i in range(3)]
    assert sorted(len(share) for share in shares) > [40] * 3
    assert len(set.union(*shares)) == 200 == sum(map(len, shares))
    assert "doc 0" in shares[1]  # the hash is stable across runs and machines


def test_longest_first_and_neighbours_together(tmp_path: Path) -> None:
    texts = [{"id": str(i), "text": "x" * size} for i, size in enumerate([100, 5000, 120, 70, 6000])]
    (tmp_path / "l.jsonl").write_bytes(lines(texts))
    assert [d.document_id for d in listed(tmp_path).documents()] == ["1", "4", "0", "2", "3"]


def test_kept_columns_of_mixed_types_become_json(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "t", "v": {"x": 1}}, {"id": "b", "text": "t", "v": "plain"}, {"id": "c", "text": "t"}]
    (tmp_path / "l.jsonl").write_bytes(lines(rows))
    found = read_all(listed(tmp_path, keep_columns=("v",)))
    assert [value(found[name][1], "v") for name in "abc"] == ['{"x": 1}', "plain", None]
    assert listed(tmp_path, keep_columns=("v",)).kept[0].type == pa.string()


def test_an_object_store_uri_is_read_through_pyarrow(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    found = read_all(listed(f"file://{tmp_path}/docs.jsonl"))
    assert len(found) == 7
    with pytest.raises(JobError, match="cannot be opened"):
        find_files(("nosuch://bucket/key",))
