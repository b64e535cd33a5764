"""How a setting is declared, named and checked; the same for flags, job files and keyword arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import field
from datetime import date
from pathlib import Path
from typing import Any

from pipeline.errors import JobError, nearest, one_line

# What every number that is stored or sent on can hold.
LARGEST = 2**53
Kind = str  # "str" | "int" | "float" | "bool" | "list" | "map" | "auto_int" | "shard" | "date"


def option(
    default: Any,
    kind: Kind,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    changes_output: bool = False,
    group: str = "job",
) -> Any:
    """A dataclass field with what the command line, job files and documentation need to know of it."""
    metadata = {
        "kind": kind,
        "meaning": meaning,
        "choices": choices,
        "low": low,
        "high": high,
        "changes_output": changes_output,
        "group": group,
    }
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


_TYPES: dict[Kind, tuple[Any, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "map": (Mapping,),
}
_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "map": "a mapping"}


def checked(name: str, value: Any, rules: Mapping[str, Any], default: Any) -> Any:
    """`value` in its normal form. Raises JobError if its type, choice or range is wrong."""
    kind = rules["kind"]
    if value is None and default is None:
        return None
    if kind == "list":
        return _name_list(name, value)
    if kind == "date":
        return _checked_date(name, value)
    if kind == "shard":
        return _checked_shard(name, value)
    if kind == "auto_int":
        if value == "auto":
            return value
        kind = "int"
    if kind == "str" and isinstance(value, Path):
        value = str(value)
    if (isinstance(value, bool) and kind != "bool") or not isinstance(value, _TYPES[kind]):
        extra = " or auto" if rules["kind"] == "auto_int" else ""
        raise JobError(f"{flag(name)} must be {_WORDS[kind]}{extra}, got {short(value)}")
    if rules["choices"] and value not in rules["choices"]:
        raise JobError(
            f"{flag(name)} must be one of {', '.join(rules['choices'])}, got {short(value)}"
            + nearest(value, rules["choices"])
        )
    if kind in ("int", "float"):
        low, high = rules["low"], rules["high"]
        if abs(value) > LARGEST or not math.isfinite(value):
            raise JobError(f"{flag(name)} must be a number of at most {LARGEST:,}, got {short(value)}")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"in {low}..{high}"
            raise JobError(f"{flag(name)} must be {bounds}, got {short(value)}")
        return float(value) if kind == "float" else value
    if kind == "str":
        return _printable(name, value)
    return _json_map(name, value) if kind == "map" else value


def short(value: Any) -> str:
    """A value for a message, without secrets, on one line."""
    try:
        return one_line(repr(value), 80)
    except Exception:  # a number of more digits than Python prints, an object whose repr fails
        return f"a value of type {type(value).__name__}"


def _printable(name: str, value: str) -> str:
    """`value`, which must be text that a path, a prompt or a file can hold."""
    if "\0" in value or (not value.isprintable() and any("\ud800" <= char <= "\udfff" for char in value)):
        raise JobError(f"{flag(name)} must be text without NUL and lone surrogates, got {short(value)}")
    return value


def _json_map(name: str, value: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy, which the caller cannot change, and which the manifest and the fingerprint can hold."""
    try:
        if all(isinstance(key, str) for key in value):
            return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        pass
    raise JobError(f"{flag(name)} must be a mapping of JSON values with text as keys, got {short(value)}")


def _name_list(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str | Path) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Path) for item in items):
        raise JobError(f"{flag(name)} must be one name or a list of names, got {short(value)}")
    if name == "keep_columns":
        items = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
    return tuple(dict.fromkeys(_printable(name, str(item)) for item in items))


def _checked_date(name: str, value: Any) -> str:
    """In ISO form; YAML reads 2026-11-28 as a date."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise JobError(f"{flag(name)} must be a date like 2026-11-28, got {short(value)}") from None


def _checked_shard(name: str, value: Any) -> str:
    index, slash, count = (value if isinstance(value, str) else "").partition("/")
    numbers = slash and index.isdecimal() and count.isdecimal() and len(index) < 10 and len(count) < 10
    if not numbers or int(index) >= int(count):
        raise JobError(f"{flag(name)} must be i/n with 0 <= i < n, got {short(value)}")
    return f"{int(index)}/{int(count)}"
