"""Dataclasses whose fields are columns of a Parquet file: each is declared once, with its meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import pyarrow as pa

T = TypeVar("T")
# By annotation.
_ARROW = {
    str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), datetime: pa.timestamp("us", tz="UTC"),
}  # fmt: skip


def column(
    meaning: str, *, unit: str = "", null: str = "", origin: str = "", arrow: pa.DataType | None = None,
    joined: Callable[..., Any] | None = None, **default: Any,
) -> Any:  # fmt: skip
    """A dataclass field that is a column. `default` and `default_factory` are those of dataclasses.field().

    meaning: what it says. unit: of numbers. null: when it has no value; where the type allows None, and only there.
    origin: who measures it, unless the group says so. arrow: its type where it does not follow from the annotation.
    joined: how rows make one (pipeline.results.rows.EngineFields).
    """
    about = {"meaning": meaning, "unit": unit, "null": null, "origin": origin, "arrow": arrow}
    return field(metadata={"column": about, "joined": joined}, **default)


def group(origin: str, null: str = "", **default: Any) -> Any:
    """A dataclass field that holds columns of its own. origin: who measures them. null: when all of them are null."""
    return field(metadata={"group": {"origin": origin, "null": null}}, **default)


def same_as(owner: type, name: str, **default: Any) -> Any:
    """A dataclass field that is the column `name` of another dataclass."""
    declared = next(item for item in fields(owner) if item.name == name)
    return field(metadata=declared.metadata, **default)


@dataclass(frozen=True)
class Column:
    """A column, as its declaration has it. null: when it has no value, empty if it always has one.

    group: the row's field that holds it, empty if the row itself does.
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str
    null: str
    origin: str
    group: str = ""

    @property
    def nullable(self) -> bool:
        """Whether rows without a value are possible."""
        return bool(self.null)

    def of(self, row: Any) -> Any:
        """Its value in a row, or in another dataclass that declares it."""
        holder = getattr(row, self.group) if self.group else row
        return None if holder is None else getattr(holder, self.name)

    def field(self) -> pa.Field:
        """As the schema of a Parquet file has it."""
        about = {"meaning": self.meaning, "unit": self.unit, "null_when": self.null, "origin": self.origin}
        return pa.field(
            self.name, self.type, self.nullable, metadata={key: text for key, text in about.items() if text}
        )


def columns_of(row_type: type) -> Iterator[Column]:
    """The columns that a dataclass declares, those of its groups in their places.

    Raises TypeError for a declaration that does not say when its column is null, or says so of one that never is.
    """
    hints = get_type_hints(row_type)
    for item in fields(row_type):
        kinds = get_args(hints[item.name]) or (hints[item.name],)
        if "group" in item.metadata:
            about = item.metadata["group"]
            for each in columns_of(kinds[0]):
                null, origin = each.null or about["null"], each.origin or about["origin"]
                yield replace(each, null=null, origin=origin, group=item.name)
        elif "column" in item.metadata:
            told = dict(item.metadata["column"])
            if bool(told["null"]) != (NoneType in kinds):
                raise TypeError(
                    f"{row_type.__name__}.{item.name}: its type says {'None' if NoneType in kinds else 'no None'}, "
                    f"and null= says {told['null'] or 'nothing'!r}; both or neither"
                )
            kind = told.pop("arrow")
            yield Column(name=item.name, type=_ARROW[kinds[0]] if kind is None else kind, **told)


def values_of(row: Any, columns: Sequence[Column]) -> dict[str, Any]:
    """A row's values by column, texts as UTF-8 can hold them."""
    found = {each.name: each.of(row) for each in columns}
    return {name: valid_text(value) if isinstance(value, str) else value for name, value in found.items()}


def from_values(row_type: type[T], values: Mapping[str, Any]) -> T:
    """A row of a type that declares columns, from its values as a Parquet reader gives them.

    A column that is null, or not there since an earlier version wrote the file, has its default; a group without any
    value is None if it may be. Raises TypeError if a column is needed that has none.
    """
    found: dict[str, Any] = {}
    hints = get_type_hints(row_type)
    for item in fields(row_type):  # type: ignore[arg-type]
        if "group" in item.metadata:
            kinds = get_args(hints[item.name]) or (hints[item.name],)
            there = any(values.get(each.name) is not None for each in columns_of(kinds[0]))
            if there or NoneType not in kinds:
                found[item.name] = from_values(kinds[0], values)
        elif values.get(item.name) is not None:
            found[item.name] = values[item.name]
    return row_type(**found)


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """Of a Parquet file with these columns; their declarations are in its fields' metadata."""
    return pa.schema([each.field() for each in columns])


def utc_now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


def valid_text(text: str) -> str:
    """`text` with what UTF-8 cannot hold (lone surrogates) spelled out as \\uXXXX."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace").decode()
    return text
