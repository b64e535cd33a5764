"""Whole inputs of random shards, types, names and URIs: no traceback, and no job refused for one bad file.

STEMLINE_FUZZ_CASES=2000 runs 2,000 cases (CI: 40).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import tempfile
from collections.abc import Callable
from decimal import Decimal
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow.fs import FileSystem
from result_rows import kept_columns, make_row

from pipeline import read_results
from pipeline.errors import DocumentError
from pipeline.imports import ROOT
from pipeline.job import manifest
from pipeline.job.plan import make_plan, survey_input
from pipeline.location import open_filesystem, printed, split_location
from pipeline.results.parts import recover
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import DocumentReader, input_hash

CASES = int(os.environ.get("STEMLINE_FUZZ_CASES", "40"))
MODEL = ROOT / "models" / "tiny-reader"
_numbers = count()

TEXTS = [
    "fine",
    "",
    " ",
    "\u200b\u200b",
    "h\0e\0l\0",
    "\ufffd" * 9,
    "%PDF-1.4 x",
    "\x1b[31m",
    "é\u202e",
    "x" * 3000,
    "a\nb",
]
# Values of each type; an id has the number of its row put in, so that none occurs twice.
VALUES: dict[str, Callable[[int], pa.Array]] = {
    "string": lambda i: pa.array([f"v{i}"]),
    "large_string": lambda i: pa.array([f"v{i}"], pa.large_string()),
    "string_view": lambda i: pa.array([f"v{i} and more than twelve bytes"]).cast(pa.string_view()),
    "binary": lambda i: pa.array([b"v%d" % i], pa.binary()),
    "not UTF-8": lambda i: pa.array([b"\xff%d" % i], pa.binary()),
    "string not UTF-8": lambda i: pa.array([b"\xff%d" % i]).view(pa.string()),
    "large_binary": lambda i: pa.array([b"v%d" % i], pa.large_binary()),
    "binary_view": lambda i: pa.array([b"v%d and more than twelve bytes" % i]).cast(pa.binary_view()),
    "fixed": lambda i: pa.array([i.to_bytes(16, "big")], pa.binary(16)),
    "dictionary": lambda i: pa.array([f"v{i}"]).dictionary_encode(),
    "int64": lambda i: pa.array([i]),
    "int8": lambda i: pa.array([i % 100], pa.int8()),
    "uint64": lambda i: pa.array([2**64 - 1 - i], pa.uint64()),
    "double": lambda i: pa.array([i + 0.5]),
    "float": lambda i: pa.array([float("nan")], pa.float32()),
    "half": lambda i: pa.array([1.5], pa.float16()),
    "bool": lambda i: pa.array([True]),
    "null": lambda i: pa.nulls(1),
    "null string": lambda i: pa.nulls(1, pa.string()),
    "decimal": lambda i: pa.array([Decimal(i)], pa.decimal128(20, 2)),
    "date": lambda i: pa.array([2**31 - 1 - i], pa.int32()).cast(pa.date32()),
    "us": lambda i: pa.array([2**63 - 1 - i], pa.timestamp("us")),
    "us UTC": lambda i: pa.array([i], pa.timestamp("us", "UTC")),
    "ns": lambda i: pa.array([2**60 + i], pa.timestamp("ns")),
    "time": lambda i: pa.array([i], pa.time64("ns")),
    "duration": lambda i: pa.array([2**62 - i], pa.duration("ns")),
    "list": lambda i: pa.array([[f"v{i}", None]]),
    "struct": lambda i: pa.array([{"a": i, "b": "x"}]),
    "doubled": lambda i: pa.StructArray.from_arrays([pa.array([i]), pa.array(["x"])], names=["a", "a"]),
    "map": lambda i: pa.array([[("k", i)]], pa.map_(pa.string(), pa.int64())),
    "uuid": lambda i: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([i.to_bytes(16, "big")], pa.binary(16))),
    "json": lambda i: pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}'])),
}
UNIQUE = sorted(set(VALUES) - {"int8", "float", "half", "json"})
JSON_VALUES = [None, True, 1, 2**53 + 1, 10**30, 0.5, "text", "\ud800", [1, "x"], {"a": {"b": None}}, "", float("inf")]

NAMES = ["a", "a b", "run#1", "100%", "%20", "[x]", "*", "?", "\x1b[2J", "\u202e", "é", "_x", "-n", "~", "港", "a\nb"]
FOLDERS = ["", "", "sub/", "_temporary/0/", "_delta_log/", "a b#1/%20/", ".hidden/"]
KINDS = ["parquet"] * 6 + [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "csv",
    "csv.gz",
    "tsv",
    "txt",
    "md",
    "html",
    "odt",
    "PARQUET",
]


def random_shard(chance: random.Random) -> dict[str, Any]:
    """What one file of an input is like."""
    columns = {"id": chance.choice(UNIQUE), "text": chance.choice([*VALUES, *["string"] * 20])}
    columns |= {"kept": chance.choice(list(VALUES)), "more": chance.choice(["int64", "list"])}
    return {
        "path": chance.choice(FOLDERS) + chance.choice(NAMES) + "." + chance.choice(KINDS),
        "columns": {name: kind for name, kind in columns.items() if chance.random() < 0.9},
        "rows": chance.randrange(5),
        "text": chance.choice(TEXTS + ["fine"] * 5),
        "json": chance.choices(JSON_VALUES, k=4),
        "damage": chance.choice([""] * 8 + ["cut", "flip", "empty", "random"]),
        "at": chance.randrange(2**20),
    }


def content(shard: dict[str, Any]) -> bytes:
    """The bytes of a shard."""
    kind, rows = shard["path"].rpartition("/")[2].partition(".")[2].lower(), shard["rows"]
    if kind == "parquet":
        data = _parquet(shard["columns"], rows, shard["text"])
    elif kind.startswith("jsonl"):
        lines = []
        for row in range(rows):
            values = {name: shard["json"][(row + i) % 4] for i, name in enumerate(shard["columns"])}
            if isinstance(values.get("id"), str | int | float) and not isinstance(values["id"], bool):
                values["id"] = f"j{next(_numbers)}"
            lines.append(json.dumps(values | ({"text": shard["text"]} if row % 2 else {})).encode() + b"\n")
        data = b"".join(lines)
        data = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind](data)
    elif kind[:3] in ("csv", "tsv"):
        data = _delimited(shard, "\t" if kind == "tsv" else ",")
        data = gzip.compress(data) if kind.endswith(".gz") else data
    else:
        data = shard["text"].encode()
    return _damaged(data, shard["damage"], shard["at"])


def _delimited(shard: dict[str, Any], separator: str) -> bytes:
    """Fields quoted or not, some as they must not be, and lines of too few."""
    lines = [separator.join(shard["columns"])]
    for row in range(shard["rows"]):
        values = [str(shard["json"][(row + i) % 4]).encode(errors="replace").decode() for i in range(4)]
        own = {"id": f"c{next(_numbers)}", "text": shard["text"]}
        fields = [own.get(name, value) for name, value in zip(shard["columns"], values, strict=False)]
        style = (shard["at"] + row) % 4
        if style == 1:
            fields = ['"' + field.replace('"', '""') + '"' for field in fields]
        elif style == 2:
            fields = [f'"{field}' for field in fields]
        lines.append(separator.join(fields[style == 3 :]))
    return "\n".join(lines).encode()


def _parquet(types: dict[str, str], rows: int, text: str) -> bytes:
    made = {name: [VALUES[kind](next(_numbers)) for _ in range(rows)] for name, kind in types.items()}
    table = pa.table(
        {
            name: pa.chunked_array(arrays) if arrays else VALUES[types[name]](0).slice(0, 0)
            for name, arrays in made.items()
        }
    )
    if rows and types.get("text") == "string":
        table = table.set_column(table.column_names.index("text"), "text", pa.array([text] * rows))
    out = pa.BufferOutputStream()
    pq.write_table(table, out, row_group_size=2)
    return out.getvalue().to_pybytes()


def _damaged(data: bytes, how: str, at: int) -> bytes:
    if how == "cut":
        return data[: at % (len(data) + 1)]
    if how == "flip" and data:
        place = at % len(data)
        return data[:place] + bytes([data[place] ^ (1 << at % 8)]) + data[place + 1 :]
    return {"empty": b"", "random": at.to_bytes(4, "big") * 20}.get(how, data)


def _write(files: FileSystem, path: str, data: bytes) -> None:
    files.create_dir(path.rpartition("/")[0], recursive=True)
    with files.open_output_stream(path, compression=None) as stream:
        stream.write(data)


@pytest.mark.parametrize("part", range(4))
def test_a_job_over_any_shards_gives_every_document_its_row(part: int) -> None:
    for seed in range(part, CASES, 4):
        try:
            one_job(random.Random(seed))
        except BaseException:
            print(f"seed {seed}")
            raise


def one_job(chance: random.Random) -> None:
    """List, read, write and list again what a random input holds."""
    where, name = chance.choice(["path", "file", "mock"]), chance.choice(NAMES)
    keep = chance.choice([(), ("kept",), ("kept", "more")])
    with tempfile.TemporaryDirectory() as temporary:
        place = f"fuzz{next(_numbers)}/{name}"
        root = place if where == "mock" else f"{temporary}/{place}"
        prefix = {"path": "", "file": "file:///", "mock": "mock:///"}[where]
        source, output = (printed(prefix, f"{root}/{part}") for part in ("docs", "out"))
        files = open_filesystem(split_location(source).filesystem)
        base = split_location(source).path
        for shard in (random_shard(chance) for _ in range(chance.randrange(6))):
            _write(files, f"{base}/{shard['path']}", content(shard))
        good = {f"good{next(_numbers)}": f"good text {i}" for i in range(2)}
        rows = [{"id": key, "text": text, "kept": i, "more": [i]} for i, (key, text) in enumerate(good.items())]
        _write(files, f"{base}/good.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        config = JobConfig(input=(source,), output=output, model=str(MODEL), keep_columns=keep)
        store = Store(output)
        store.create()
        assert _do(config, store) == len(survey_input(config).catalogue)
        read_results(output).validate(full=True)
        found = {row["document_id"]: row for row in read_results(output, _COLUMNS).to_pylist()}
        assert {key: found[key]["output"] for key in good} == good
        assert all(found[key]["kept_error"] is None for key in good)
        for row in found.values():
            assert row["status"] == "ok" or ("\n" not in row["error"] and row["error"].isprintable()), row
        assert recover(store) == []
        plan = make_plan(survey_input(config), store)
        assert (len(plan.pending), plan.already) == (0, len(found)), "nothing is paid twice"


_COLUMNS = ["document_id", "status", "error", "output", "kept_error"]


def _do(config: JobConfig, store: Store) -> int:
    """What a job does, with each text as its output; the rows written."""
    survey = survey_input(config)
    sink = Sink(store, result_schema(survey.catalogue.kept), flush_documents=3, flush_seconds=60)
    reader = DocumentReader("text", survey.catalogue.kept)
    for document in make_plan(survey, store).pending.documents():
        about: dict[str, Any] = {"input_stamp": document.stamp, "attempts": 1}
        try:
            if document.error:
                raise DocumentError(document.error)
            text, kept = reader.read(document)
        except DocumentError as error:
            sink.add(make_row(document.document_id, document.source, "error", str(error), **about))
            continue
        about |= {"output": text, "input_hash": input_hash(text, kept)}
        sink.add(make_row(document.document_id, document.source, "ok", **about, **kept_columns(kept)))
    sink.flush()
    manifest.save(store, config, survey.prints)
    return sink.rows_written
