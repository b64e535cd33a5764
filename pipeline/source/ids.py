"""Which column holds what, and what text an id of any type is."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pyarrow as pa

from pipeline.errors import one_line
from pipeline.results.columns import valid_text

DEFAULT_IDS = ("id", "document_id")
# Ids are held for all documents at once.
MOST_CHARACTERS = 65_536


def id_name(names: Container[str], id_column: str | None) -> str | None:
    """Which of a line's or file's columns holds the id; None if it gets one from its place.

    id_column: None takes one of DEFAULT_IDS that is there, "" none.
    """
    if id_column is None:
        return next((name for name in DEFAULT_IDS if name in names), None)
    return id_column or None


def column_problem(names: list[str], name: str) -> str:
    """Why a file with columns of these names has not the one of the name `name`; "" if it has."""
    count = names.count(name)
    if not count:
        return f"it has no column {name!r}; found: {', '.join(one_line(found, 80) for found in names)}"
    return f"it has {count} columns of the name {name!r}; rename them" if count > 1 else ""


def json_id(value: Any) -> tuple[str, str]:
    """(text, "") of an id in a JSON object, or ("", what it is instead)."""
    if value is None or isinstance(value, bool | dict | list):
        return "", "null" if value is None else {bool: "true or false", dict: "an object"}.get(type(value), "a list")
    return _checked(str(value))


def id_texts(column: pa.Array) -> list[tuple[str, str]]:
    """`json_id` of each value of a column of a Parquet file."""
    if pa.types.is_dictionary(column.type):
        texts = [*id_texts(column.dictionary), ("", "null")]
        return [texts[-1 if index is None else index] for index in column.indices.to_pylist()]
    if pa.types.is_nested(column.type) or pa.types.is_boolean(column.type):
        return [("", f"{column.type}")] * len(column)
    return [_id_text(column, number) for number in range(len(column))]


def _id_text(column: pa.Array, number: int) -> tuple[str, str]:
    try:
        value: Any = _spelled(column, number) if "[ns" in str(column.type) else column[number].as_py()
    except UnicodeDecodeError:
        return "", "not valid UTF-8"
    except (ValueError, OverflowError):
        value = _spelled(column, number)
    if value is None:
        return "", "null"
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.hex()
    return _checked(str(value))


def _spelled(column: pa.Array, number: int) -> str | None:
    """A value as text, of times that Python has no object for."""
    return column.slice(number, 1).cast(pa.string())[0].as_py()


def _checked(text: str) -> tuple[str, str]:
    if not text:
        return "", "empty"
    if len(text) > MOST_CHARACTERS:
        return "", f"of {len(text):,} characters (at most {MOST_CHARACTERS:,})"
    return valid_text(text), ""
