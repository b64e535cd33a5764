"""The Arrow type of a schema's answers, and answers as values of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.results.columns import valid_text

LARGEST_INT = 2**63


class MisfitError(ValueError):
    """An answer is valid by its schema, and its column's type does not hold it."""


@dataclass(frozen=True)
class Typed:
    """arrow: the type. convert: a JSON value, valid by the schema and not null, to one of the type; or MisfitError."""

    arrow: pa.DataType
    convert: Callable[[Any], Any]

    def value(self, found: Any) -> Any:
        """A JSON value as one of the type; null stays null."""
        return None if found is None else self.convert(found)


def json_text(value: Any) -> str:
    """A value as JSON text. Raises MisfitError."""
    try:
        return valid_text(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise MisfitError("it holds a number beyond 64-bit floats; give the schema a minimum and a maximum") from None


def _whole(value: Any) -> int:
    number = int(value)  # JSON Schema calls 1.0 an integer, too
    if not -LARGEST_INT <= number < LARGEST_INT:
        raise MisfitError("it holds a whole number of more than 64 bits; give the schema a minimum and a maximum")
    return number


def _real(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if abs(number) == float("inf"):
        raise MisfitError("it holds a number beyond 64-bit floats; give the schema a minimum and a maximum")
    return number


TEXT = Typed(pa.string(), valid_text)
JSON = Typed(pa.string(), json_text)
_SIMPLE = {
    "string": TEXT, "integer": Typed(pa.int64(), _whole), "number": Typed(pa.float64(), _real),
    "boolean": Typed(pa.bool_(), bool),
}  # fmt: skip


def typed(schema: Any, root: Mapping[str, Any], inside: tuple[str, ...] = ()) -> Typed:
    """The type of a schema's values. What no Arrow type holds (several types, free keys, recursion) is JSON text.

    root: the whole schema, for references. inside: references that lead here.
    """
    if not isinstance(schema, Mapping):
        return JSON
    if "$ref" in schema:
        reference = str(schema["$ref"])
        return JSON if reference in inside else typed(target(reference, root), root, (*inside, reference))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return JSON if "properties" in schema else _one_of(schema[key], root, inside)
    if "allOf" in schema:
        parts = schema["allOf"]
        alone = len(parts) == 1 and "properties" not in schema
        return typed(parts[0], root, inside) if alone else JSON
    if "enum" in schema or "const" in schema:
        return _of_values(schema.get("enum", [schema.get("const")]))
    kinds = schema.get("type", ())
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    kinds.discard("null")
    if kinds == {"integer", "number"}:
        kinds = {"number"}
    kind = kinds.pop() if len(kinds) == 1 else ""
    if kind == "array":
        return _list(schema, root, inside)
    if kind == "object":
        return _struct(schema, root, inside)
    return _SIMPLE.get(kind, JSON)


def _one_of(parts: Sequence[Any], root: Mapping[str, Any], inside: tuple[str, ...]) -> Typed:
    """The type that all alternatives but null have, if it is one."""
    others = [typed(part, root, inside) for part in parts if not _is_null(part)]
    # Of several JSON texts, or a text and a JSON text, each would be read in another way.
    same = len(others) == 1 or (others and all(other.arrow == others[0].arrow for other in others))
    if not same or (len(others) > 1 and any(other is not others[0] for other in others)):
        return JSON
    return others[0]


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and (schema.get("type") == "null" or schema.get("const", "") is None)


def _of_values(values: Sequence[Any]) -> Typed:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int, float}:
        kinds = {float}
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return _SIMPLE.get(names.get(kinds.pop(), "") if len(kinds) == 1 else "", JSON)


def _list(schema: Mapping[str, Any], root: Mapping[str, Any], inside: tuple[str, ...]) -> Typed:
    if "prefixItems" in schema or not isinstance(schema.get("items"), Mapping):
        return JSON
    item = typed(schema["items"], root, inside)
    return Typed(pa.list_(item.arrow), lambda values: [item.value(value) for value in values])


def _struct(schema: Mapping[str, Any], root: Mapping[str, Any], inside: tuple[str, ...]) -> Typed:
    properties = schema.get("properties")
    if not properties or schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return JSON
    parts = {name: typed(part, root, inside) for name, part in properties.items()}
    arrow = pa.struct([pa.field(name, part.arrow) for name, part in parts.items()])
    return Typed(arrow, lambda value: {name: part.value(value.get(name)) for name, part in parts.items()})


def target(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference inside of the schema stands for; None if nothing is there."""
    found: Any = root
    for part in unquote(reference).removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping):
            found = found.get(name)
        else:
            return None
    return found
