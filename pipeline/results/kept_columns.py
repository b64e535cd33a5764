"""Columns of the input that go into the results: as Arrow arrays, since Python has no objects for all that they hold.

Files may have different types for one column. The results have one, in which nothing is lost; where types have none in
common but text, texts. A value that does not go into it all the same is null, and the row says so.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import one_line
from pipeline.results.columns import valid_text
from pipeline.results.rows import ANSWER, NAMES

# What Arrow raises for a value that a type does not hold, and Python for one that it has no object for.
VALUE_ERRORS = (pa.ArrowException, ValueError, TypeError, OverflowError)
# Types are joined by pyarrow's rules, but where these lose digits or signs.
PROMOTE = "permissive"
_WHOLE_NUMBER = pa.decimal128(20, 0)


@dataclass(frozen=True)
class Kept:
    """What goes from a document into its row beside its text. columns: by name an array of one value, in its type.

    problem: which of them is null for what reason, empty if the values are as they were. plain: what they are
    known again by (`input_hash`). page_starts: characters of the text before each page, None without pages. note: what
    of the document is not in the text. prompt: values of the columns that prompts are made from, as Python has them.
    """

    columns: dict[str, pa.Array] = field(default_factory=dict)
    problem: str = ""
    plain: dict[str, Any] = field(default_factory=dict)
    page_starts: tuple[int, ...] | None = None
    note: str = ""
    prompt: dict[str, Any] = field(default_factory=dict)


def keep(found: Mapping[str, Any], fields: Sequence[pa.Field], prompt: Sequence[str] = ()) -> Kept:
    """What a document has for kept columns, and for those in prompts. found: arrays of one value, or JSON values."""
    columns, problems, plain = {}, [], {}
    for item in fields:
        value = found.get(item.name)
        try:
            columns[item.name] = _fitted(value, item.type)
        except VALUE_ERRORS as error:
            columns[item.name] = pa.nulls(1, item.type)
            problems.append(f"{item.name}: {one_line(error, 200)}")
        plain[item.name] = _plain(value) if isinstance(value, pa.Array) else _as_kept_json(value, item.type)
    asked = {name: _plain(value) if isinstance(value := found.get(name), pa.Array) else value for name in prompt}
    return Kept(columns, one_line("; ".join(problems)) if problems else "", plain, prompt=asked)


def prompt_text(value: Any) -> str:
    """A value as a prompt shows it: texts as they are, nothing for null, lists and objects as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, bool | list | dict):
        return valid_text(json.dumps(value, ensure_ascii=False, default=str))
    return str(value)


def _fitted(value: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(value, pa.Array):
        values = value.cast(value.type.value_type) if pa.types.is_dictionary(value.type) else value
        values.validate(full=True)  # text that is not UTF-8
    elif isinstance(value, list | dict) or (value is not None and is_text(kind) and not isinstance(value, str)):
        values = pa.array([json.dumps(value, ensure_ascii=False)])
    else:
        values = pa.array([valid_text(value) if isinstance(value, str) else value])
    return cast(values, kind)


def cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """`values` in another type. Raises one of VALUE_ERRORS where something would be lost."""
    if values.type == kind:
        return values
    if is_text(kind) or (is_bytes(kind) and not is_bytes(values.type)):
        values = as_text(values)
    return values.cast(kind)


def as_text(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Values as people write them, nested ones as JSON."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    kind = values.type
    if not pa.types.is_nested(kind) and not isinstance(kind, pa.BaseExtensionType):
        return values.cast(pa.string())
    return pa.array([_json_text(values.slice(i, 1)) for i in range(len(values))], pa.string())


def _json_text(value: pa.Array) -> str | None:
    try:
        found = value[0].as_py()
        return found if found is None else json.dumps(found, ensure_ascii=False, default=str)
    except VALUE_ERRORS:  # a struct with two fields of one name, say
        return " ".join(value.to_string().split())


def _plain(value: pa.Array) -> Any:
    """A value that is the same whatever its column's type is elsewhere, and whatever packages are installed."""
    if pa.types.is_temporal(value.type) and "[ns" in str(value.type):
        return value.cast(pa.int64())[0].as_py()  # Python has no such time
    try:
        return value[0].as_py()
    except VALUE_ERRORS:
        return value.to_string()


def _as_kept_json(value: Any, kind: pa.DataType) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) and is_text(kind) else value


def json_type(kinds: set[type]) -> pa.DataType:
    """The type of a column of JSON values; mixed and nested ones are kept as JSON text."""
    kinds = kinds - {type(None)}
    known = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return reduce(common_type, (known.get(kind, pa.string()) for kind in sorted(kinds, key=str)), pa.null())


def storable(kind: pa.DataType) -> pa.DataType:
    """The type that a kept column of a Parquet file has in the results."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind == pa.string_view():
        return pa.large_string()
    if kind == pa.binary_view():
        return pa.large_binary()
    try:  # rows are picked out of parts, and parts are merged
        values = pa.nulls(1, kind).filter(pa.array([True]))
        pq.write_table(pa.table({"values": values}), io.BytesIO())
    except pa.ArrowException:
        return pa.string()
    return kind


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds the values of both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    kinds = (one, other)
    if all(map(pa.types.is_integer, kinds)) and pa.uint64() in kinds and any(map(pa.types.is_signed_integer, kinds)):
        return _WHOLE_NUMBER
    if any(map(pa.types.is_decimal, kinds)):
        if any(map(pa.types.is_floating, kinds)):
            return pa.string()
        kinds = tuple(_WHOLE_NUMBER if pa.types.is_integer(kind) else kind for kind in kinds)
    try:
        schemas = [pa.schema([("values", kind)]) for kind in kinds]
        return pa.unify_schemas(schemas, promote_options=PROMOTE).field(0).type
    except pa.ArrowException:
        return pa.large_string() if pa.large_string() in kinds else pa.string()


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of results one after another; kept columns, and answers, that differ in their types in a common one."""
    fixed = {*NAMES} - {ANSWER}
    for name in dict.fromkeys(name for table in tables for name in table.column_names if name not in fixed):
        kinds = [table.schema.field(name).type for table in tables if name in table.column_names]
        if any(kind != kinds[0] for kind in kinds):
            tables = _in_common_type(tables, name, reduce(common_type, kinds))
    return pa.concat_tables(tables, promote_options=PROMOTE)


def _in_common_type(tables: Sequence[pa.Table], name: str, kind: pa.DataType) -> list[pa.Table]:
    try:
        return [_with_type(table, name, kind) for table in tables]
    except VALUE_ERRORS:
        return [_with_type(table, name, pa.string()) for table in tables]


def _with_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    if name not in table.column_names:
        return table
    values = table[name].combine_chunks()
    values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    return table.set_column(table.column_names.index(name), pa.field(name, kind), cast(values, kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values of a type are bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
