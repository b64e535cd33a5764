"""How a setting is declared and checked: once, as a field of the dataclass that it is used in.

Whatever else speaks of it (flags, job files, pages, records that pass it on) is made from that field.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, field, fields
from typing import Any

# What every number that is stored or sent on can hold.
LARGEST = 2**53

_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


class SettingError(ValueError):
    """A value that a setting cannot have. expected: in words, after "must be"; hint: more, with what leads up to it."""

    def __init__(self, name: str, expected: str, value: Any, hint: str = "") -> None:
        super().__init__(name, expected, value, hint)
        self.name, self.expected, self.value, self.hint = name, expected, value, hint

    def __str__(self) -> str:
        return f"{self.name} must be {self.expected}, got {self.value!r}{self.hint}"


def setting(
    default: Any,
    meaning: str,
    *,
    more: str = "",
    kind: str = "",
    choices: Collection[Any] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    divides_block: bool = False,
    group: str = "",
    changes_output: bool = False,
    added_later: bool = False,
) -> Any:
    """A dataclass field that knows what it means and what it accepts.

    meaning: a line for --help, with the unit. more: what the documentation says besides.
    kind: "str", "int", "float", "bool", or a name that the caller of checked() knows; "": as annotated. None is
        accepted where the annotation has it.
    choices: values, or the table that has them as keys. low, high: smallest and largest number; above: what a number
        must be larger than.
    divides_block: a divisor of StemConfig.block_size. group: heading of the flag. changes_output: whether results made
        with another value are of another job. added_later: there are results that are older than the setting; they are
        of the same job while it has its default.
    """
    rules = {
        "meaning": meaning, "more": more, "kind": kind, "choices": choices, "low": low, "above": above, "high": high,
        "divides_block": divides_block, "group": group, "changes_output": changes_output, "added_later": added_later,
    }  # fmt: skip
    return field(default=default, metadata=rules)


def kind_of(item: Field[Any]) -> str:
    """The kind of a setting: as declared, else as annotated."""
    return item.metadata["kind"] or str(item.type).removesuffix(" | None")


def checked(item: Field[Any], value: Any, kinds: Mapping[str, Callable[[str, Any], Any]] | None = None) -> Any:
    """`value` in its normal form. Raises SettingError if its type, choice or range is wrong.

    kinds: by the name of a kind, what gives the normal form for (name of the setting, value), or raises SettingError.
    """
    name, rules, kind = item.name, item.metadata, kind_of(item)
    if value is None and str(item.type).endswith("| None"):
        return None
    if kinds and kind in kinds:
        value = kinds[kind](name, value)
    elif not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise SettingError(name, _WORDS[kind], value)
    if rules["choices"] and value not in rules["choices"]:
        known = [str(choice) for choice in rules["choices"]]
        raise SettingError(name, f"one of {', '.join(known)}", value, nearest(str(value), known))
    if isinstance(value, int | float) and kind != "bool":
        if abs(value) > LARGEST or not math.isfinite(value):
            raise SettingError(name, f"a number of at most {LARGEST:,}", value)
        low, above, high = rules["low"], rules["above"], rules["high"]
        if (
            (low is not None and value < low)
            or (above is not None and value <= above)
            or (high is not None and value > high)
        ):
            raise SettingError(name, bounds(rules), value)
    return float(value) if kind == "float" else value


def check_all(record: Any) -> None:
    """Check every setting of a frozen dataclass, and leave it in its normal form. Raises SettingError."""
    for item in fields(record):
        if item.metadata:
            object.__setattr__(record, item.name, checked(item, getattr(record, item.name)))


def bounds(rules: Mapping[str, Any]) -> str:
    """The numbers that a setting accepts, in words; empty if it accepts all."""
    low, above, high = (None if rules[key] is None else f"{rules[key]:,}" for key in ("low", "above", "high"))
    if low is not None and high is not None:
        return f"in {low}..{high}"
    parts = [("at least", low), ("above", above), ("at most", high)]
    return " and ".join(f"{words} {number}" for words, number in parts if number is not None)


def values_of(record: Any, kind: type) -> dict[str, Any]:
    """By name, the fields of `record` that the dataclass `kind` has."""
    return {item.name: getattr(record, item.name) for item in fields(kind)}


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name that is closest to `name`, or nothing."""
    # A name of three letters is like too many others: gpu is not meant to be cpu.
    close = difflib.get_close_matches(name, list(known), n=1) if len(name) > 3 else []
    return f"; did you mean {close[0]!r}?" if close else ""
