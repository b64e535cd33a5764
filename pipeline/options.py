"""How a setting is declared, named and checked; the same for flags, job files and keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pipeline.errors import JobError, nearest

Kind = str  # "str" | "int" | "float" | "bool" | "list" | "map" | "auto_int" | "shard"


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
    if kind == "shard":
        return _checked_shard(name, value)
    if kind == "auto_int":
        if value == "auto":
            return value
        kind = "int"
    if kind == "str" and isinstance(value, Path):
        return str(value)
    if (isinstance(value, bool) and kind != "bool") or not isinstance(value, _TYPES[kind]):
        extra = " or auto" if rules["kind"] == "auto_int" else ""
        raise JobError(f"{flag(name)} must be {_WORDS[kind]}{extra}, got {value!r}")
    if rules["choices"] and value not in rules["choices"]:
        raise JobError(
            f"{flag(name)} must be one of {', '.join(rules['choices'])}, got {value!r}"
            + nearest(str(value), rules["choices"])
        )
    if kind in ("int", "float"):
        low, high = rules["low"], rules["high"]
        if value != value or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"in {low}..{high}"
            raise JobError(f"{flag(name)} must be {bounds}, got {value}")
        return float(value) if kind == "float" else value
    return dict(value) if kind == "map" else value  # a copy, which the caller cannot change


def _name_list(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str | Path) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Path) for item in items):
        raise JobError(f"{flag(name)} must be one name or a list of names, got {value!r}")
    if name == "keep_columns":
        items = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
    return tuple(dict.fromkeys(str(item) for item in items))


def _checked_shard(name: str, value: Any) -> str:
    index, slash, count = str(value).partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise JobError(f"{flag(name)} must be i/n with 0 <= i < n, got {value!r}")
    return f"{int(index)}/{int(count)}"
