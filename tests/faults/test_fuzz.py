"""Random inputs and settings: an error row or a one-line error, never a traceback, never a lost neighbour.

The number of cases comes from the environment: STEMLINE_FUZZ_CASES=500 runs 500 of each kind (CI: 40).
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from result_rows import kept_columns, make_row

from jobs.cli import Parser, add_job_flags, job_config
from pipeline.errors import DocumentError, JobError
from pipeline.job.configs import make_worker_config
from pipeline.results.rows import result_schema, to_table
from pipeline.settings.config import JobConfig, read_job_file
from pipeline.settings.questions import questions_of
from pipeline.source import DocumentReader, find_files, input_hash, list_documents

CASES = int(os.environ.get("STEMLINE_FUZZ_CASES", "40"))
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

# Text as it comes: separators, line breaks, NULs, lone surrogates, control strings, very long.
ODD = [
    "",
    " ",
    "\n",
    "a/b",
    "../../etc/passwd",
    "a\nb",
    "\0",
    "\ud800",
    "a\ud800b",
    "<|im_end|>",
    "x" * 5000,
    "é",
    "\ufeff",
]
texts = st.text(max_size=40) | st.sampled_from(ODD) | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=9)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -1, 2**63, float("inf"), float("nan")]))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


def one_line(error: object) -> None:
    """What people are told is one line."""
    assert str(error)
    assert "\n" not in str(error)


def listed_and_read(folder: Path, good: set[str], **options: Any) -> None:
    """What the driver and a worker do with an input; every error is one line, every good document is read."""
    try:
        files, _ = find_files((str(folder),))
        catalogue = list_documents(files, **options)
    except JobError as error:
        one_line(error)
        # The whole input may be refused: doubled ids, no such column, nothing readable.
        return
    reader = DocumentReader(options.get("text_column", "text"), catalogue.kept)
    schema = result_schema(catalogue.kept)
    rows, readable = [], set()
    for position in range(len(catalogue)):
        document = catalogue.document(position)
        if document.error:
            one_line(document.error)
            rows.append(make_row(document.document_id, document.source, "error", document.error))
            continue
        try:
            text, kept = reader.read(document)
        except DocumentError as error:
            one_line(error)
            rows.append(make_row(document.document_id, document.source, "error", str(error)))
            continue
        readable.add(document.document_id)
        done = {"output": text, "input_hash": input_hash(text, kept)}
        rows.append(make_row(document.document_id, document.source, "ok", **done, **kept_columns(kept)))
    table = to_table(rows, schema)
    assert table.num_rows == len(catalogue), "one row a document"
    assert len(set(table["document_id"].to_pylist())) == len(catalogue)
    written = pa.BufferOutputStream()
    pq.write_table(table, written)
    assert good <= readable, f"a neighbour is lost: {good - readable}"


GOOD = b'{"id": "good-1", "text": "fine"}\n', b'{"id": "good-2", "text": "also fine"}\n'


@fuzz
@given(st.lists(st.one_of(st.binary(max_size=80), nested.map(lambda v: json.dumps(v).encode())), max_size=6))
def test_jsonl_of_random_lines(lines: list[bytes]) -> None:
    data = GOOD[0] + b"".join(line.replace(b"\n", b" ") + b"\n" for line in lines) + GOOD[1]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a.jsonl").write_bytes(data)
        listed_and_read(Path(name), {"good-1", "good-2"} - _ids(lines))


def _ids(lines: list[bytes]) -> set[str]:
    """Ids that random lines may have taken from the good ones (then the input is refused)."""
    return {name for name in ("good-1", "good-2") if any(name.encode() in line for line in lines)}


objects = st.fixed_dictionaries(
    {}, optional={"id": nested, "document_id": nested, "text": nested, "year": nested, "tags": nested}
)


@fuzz
@given(st.lists(objects, min_size=1, max_size=6), st.sampled_from([(), ("year",), ("year", "tags")]))
def test_jsonl_of_random_objects_with_kept_columns(rows: list[dict[str, Any]], keep: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(name) / "a.jsonl").write_bytes(GOOD[0] + text.encode())
        listed_and_read(Path(name), set() if keep else {"good-1"}, keep_columns=keep)


@fuzz
@given(st.binary(max_size=400), st.sampled_from([".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".PARQUET"]))
def test_files_of_random_bytes(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / f"x{suffix}").write_bytes(data)
        (Path(name) / "good.txt").write_text("fine")
        listed_and_read(Path(name), {"good.txt"})


@fuzz
@given(
    st.sampled_from(["gz", "zst", "parquet", "jsonl"]), st.integers(0, 2000), st.integers(0, 255), st.integers(0, 2000)
)
def test_files_with_a_damaged_byte_or_an_end_too_early(kind: str, place: int, value: int, cut: int) -> None:
    rows = b"".join(b'{"id": "d%d", "text": "text number %d"}\n' % (i, i) for i in range(20))
    if kind == "parquet":
        stream = pa.BufferOutputStream()
        ids = [f"d{i}" for i in range(20)]
        pq.write_table(pa.table({"id": ids, "text": ids}), stream, row_group_size=5)
        data = bytearray(stream.getvalue().to_pybytes())
    else:
        data = bytearray({"gz": gzip.compress, "zst": zstandard.compress, "jsonl": bytes}[kind](rows))
    data[place % len(data)] = value
    data = data[: len(data) - (cut % len(data) if cut % 2 else 0)]
    with tempfile.TemporaryDirectory() as name:
        suffix = {"gz": "jsonl.gz", "zst": "jsonl.zst"}.get(kind, kind)
        (Path(name) / f"x.{suffix}").write_bytes(bytes(data))
        (Path(name) / "good.txt").write_text("fine")
        listed_and_read(Path(name), {"good.txt"})


types = st.sampled_from(
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.int64(), pa.float32(),
        pa.bool_(), pa.null(), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.date32(), pa.time64("ns"),
        pa.duration("ns"), pa.decimal128(20, 3), pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.string()),
        pa.struct([("text", pa.string()), ("id", pa.int8())]), pa.map_(pa.string(), pa.int64()), pa.float16(),
        pa.binary(4), pa.list_(pa.struct([("a", pa.list_(pa.int8()))])),
    ]
)  # fmt: skip


def array_of(kind: pa.DataType, bits: int, count: int) -> pa.Array:
    """`count` values of a type, some of them null, out of a few random bits."""
    numbers = [(bits >> i) % 1000 for i in range(count)]
    null = [bool(bits >> (i + 3) & 1) for i in range(count)]
    if pa.types.is_null(kind):
        return pa.nulls(count)
    if pa.types.is_dictionary(kind):
        words = [None if n else ODD[x % 6] for x, n in zip(numbers, null, strict=True)]
        return pa.array(words, pa.string()).dictionary_encode()
    if pa.types.is_map(kind):
        values: list[Any] = [[("k", x)] for x in numbers]
    elif pa.types.is_struct(kind):
        values = [{"text": "inner", "id": x % 100} for x in numbers]
    elif pa.types.is_list(kind):
        values = [["x"] if pa.types.is_string(kind.value_type) else [{"a": [1]}] for _ in numbers]
    elif pa.types.is_boolean(kind):
        values = [bool(x % 2) for x in numbers]
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        values = [b"\xff\x00bytes" if x % 2 else b"plain %d" % x for x in numbers]
    elif pa.types.is_fixed_size_binary(kind):
        values = [b"abcd"] * count
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        values = [["", " ", "a/b", "a\nb", "\0"][x % 5] + str(x) for x in numbers]
    elif pa.types.is_decimal(kind):
        return pa.array([Decimal(x) for x in numbers], kind)
    elif pa.types.is_date32(kind) or kind in (pa.float16(), pa.float32()):
        return pa.array(numbers, pa.int32()).cast(kind) if pa.types.is_date32(kind) else pa.array(numbers, kind)
    else:
        return pa.array(numbers, pa.int64()).cast(kind)
    return pa.array([None if n else x for x, n in zip(values, null, strict=True)], kind)


@fuzz
@given(types, types, types, st.integers(0, 2**40), st.integers(0, 12), st.sampled_from([(), ("more",)]))
def test_parquet_of_any_types(
    id_type: pa.DataType, text_type: pa.DataType, more: pa.DataType, bits: int, count: int, keep: tuple[str, ...]
) -> None:
    columns = {"id": array_of(id_type, bits, count), "text": array_of(text_type, bits >> 7, count)}
    table = pa.table(columns | {"more": array_of(more, bits >> 13, count)})
    with tempfile.TemporaryDirectory() as name:
        pq.write_table(table, Path(name) / "a.parquet", row_group_size=4)
        listed_and_read(Path(name), set(), keep_columns=keep)
        (Path(name) / "good.jsonl").write_bytes(GOOD[0])
        listed_and_read(Path(name), {"good-1"})


@fuzz
@given(st.lists(st.sampled_from(["id", "text", "text.inner", "id ", "Text", ""]), min_size=1, max_size=5))
def test_parquet_with_odd_and_doubled_column_names(names: list[str]) -> None:
    table = pa.Table.from_arrays([pa.array(["a", "b"]) for _ in names], names=names)
    with tempfile.TemporaryDirectory() as name:
        pq.write_table(table, Path(name) / "a.parquet")
        for column in {*names, "text"}:
            listed_and_read(Path(name), set(), text_column=column)


@fuzz
@given(st.lists(texts, min_size=1, max_size=6, unique=True))
def test_ids_are_names_and_never_paths(ids: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        rows = [{"id": document_id, "text": "t"} for document_id in ids]
        (Path(name) / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        before = sorted(Path(name).rglob("*"))
        listed_and_read(Path(name), set())
        assert sorted(Path(name).rglob("*")) == before


SETTINGS = sorted(JobConfig.__dataclass_fields__)
ODD_VALUES = ["0/2", "auto", "3/3", "9" * 5000 + "/1", b"bytes", object(), Path("x"), -5, 0.5, "dense", 10**9000]
values = nested | st.sampled_from(ODD_VALUES)
BASE = {"input": "docs", "output": "out", "model": "models/tiny-reader"}


def checked(config: JobConfig) -> None:
    """What follows from settings before anything is started."""
    config.fingerprint()
    config.shard_pair()
    make_worker_config_of(config)


def make_worker_config_of(config: JobConfig) -> None:
    make_worker_config(config, questions_of(config), date(2001, 2, 3), "cpu", 1)


@fuzz
@given(st.dictionaries(st.sampled_from(SETTINGS), values, max_size=4))
def test_settings_of_any_value(changes: dict[str, Any]) -> None:
    try:
        checked(JobConfig(**(BASE | changes)))
    except JobError as error:
        one_line(error)


ODD_YAML = ["a: 2020-99-99", "[" * 3000, "{[a]: b}", "<<: 5", "&a [*a]", "max_new_tokens: 1e999", "deadline: .inf"]
ODD_YAML += ["x: !!python/object/apply:os.system [id]", "chat_template_args: {a: 2020-01-01}"]
job_files = st.dictionaries(st.sampled_from(SETTINGS) | texts, nested, max_size=4).map(yaml.safe_dump)


@fuzz
@given(st.one_of(job_files, texts, st.binary(max_size=60), st.sampled_from(ODD_YAML)))
def test_job_files_of_any_content(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "job.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        try:
            checked(JobConfig(**(BASE | read_job_file(str(path)))))
        except JobError as error:
            one_line(error)


words = st.sampled_from([f"--{n.replace('_', '-')}" for n in SETTINGS] + ["-1", "--x=y", "{", "--config", "--"]) | texts


@fuzz
@given(st.lists(words, max_size=6))
def test_command_lines_of_any_words(words: list[str]) -> None:
    parser = Parser(prog="x", allow_abbrev=False)
    add_job_flags(parser)
    try:
        checked(job_config(parser.parse_args([*(f"--{k}={v}" for k, v in BASE.items()), *words])))
    except JobError as error:
        one_line(error)
    except SystemExit as ended:  # --help
        assert_help(ended, words)


def assert_help(ended: SystemExit, words: list[str]) -> None:
    assert ended.code == 0
    assert {"--help", "-h"} & set(words)


def test_texts_of_no_and_of_fifty_million_bytes(tmp_path: Path) -> None:
    large = "fifty million bytes\n" * 2_500_000
    rows = [{"id": "none", "text": ""}, {"id": "large", "text": large}, {"id": "good", "text": "fine"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed_and_read(tmp_path, {"large", "good"})
    pq.write_table(pa.Table.from_pylist([{**row, "id": row["id"] + "-p"} for row in rows]), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"")
    listed_and_read(tmp_path, {"large", "good", "large-p", "good-p"})
