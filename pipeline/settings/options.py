"""Settings on the command line, in job files and as keyword arguments: names, and kinds beyond those of numbers."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import JobError, one_line
from stem_core.settings import SettingError, checked


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def check_flags(record: Any) -> None:
    """Check every setting of a frozen dataclass, and leave it in its normal form. Raises JobError, by the flag."""
    for item in fields(record):
        try:
            value = checked(item, getattr(record, item.name), KINDS)
        except SettingError as error:
            raise flag_error(error) from None
        object.__setattr__(record, item.name, value)


def flag_error(error: SettingError) -> JobError:
    """The error by the flag's name, without secrets."""
    return JobError(f"{flag(error.name)} must be {error.expected}, got {short(error.value)}{error.hint}")


def short(value: Any) -> str:
    """A value for a message, without secrets, on one line."""
    try:
        return one_line(repr(value), 80)
    except Exception:  # a number of more digits than Python prints, an object whose repr fails
        return f"a value of type {type(value).__name__}"


def read_yaml(path: str, asked: str) -> Any:
    """What a YAML file holds. asked: the flag that names it. Raises JobError."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise JobError(f"{asked} {path}: cannot be read: {one_line(error)}") from None
    try:
        return yaml.load(text, _unique_keys())
    except yaml.MarkedYAMLError as error:
        raise JobError(f"{asked} {path}: not valid YAML: {_yaml_problem(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # ValueError: a 13th month, say
        raise JobError(f"{asked} {path}: not valid YAML: {one_line(error)}") from None


@cache
def _unique_keys() -> type:
    """A SafeLoader that refuses a key that is there twice, of which the last would count alone."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value!r} is there twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return UniqueKeys


def holdable(text: str) -> bool:
    """Whether a path, a prompt or a file can hold it: it has no NUL and no lone surrogates."""
    return "\0" not in text and (text.isprintable() or not any("\ud800" <= char <= "\udfff" for char in text))


def json_copy(value: Any) -> Any:
    """A copy, which the caller cannot change, and which the manifest and the fingerprint can hold.

    Raises ValueError for what JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _yaml_problem(error: Any) -> str:
    """Where a YAML file is wrong, and what is most often the cause. error: yaml.MarkedYAMLError."""
    hints = {
        "mapping values are not allowed": "; put a text with ': ' in it between quotes",
        "<scalar>": "; quotes stand around a whole text, or not at all",
        "expected <block end>": "; the keys of one entry begin in the same column",
        "cannot start any token": "; indent by spaces, and put a text that begins with a sign between quotes",
    }
    problem = str(error.problem or error.context)
    hint = next((told for part, told in hints.items() if part in problem), "")
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{one_line(problem)}{hint}"


def _text(name: str, value: Any) -> str:
    """Text that a path, a prompt or a file can hold."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        raise SettingError(name, "text", value)
    if not holdable(value):
        raise SettingError(name, "text without NUL and lone surrogates", value)
    return value


def _map(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingError(name, "a mapping", value)
    with suppress(ValueError):
        if all(isinstance(key, str) for key in value):
            return json_copy(dict(value))
    raise SettingError(name, "a mapping of JSON values with text as keys", value)


def _list(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str | Path) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Path) for item in items):
        raise SettingError(name, "one name or a list of names", value)
    return tuple(dict.fromkeys(_text(name, item) for item in items))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them blank."""
    return _several(name, () if value is None else value, str.strip)


def _stops(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, white space as it stands."""
    return _several(name, value, bool)


def _several(name: str, value: Any, valid: Callable[[str], Any]) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and valid(item) for item in items):
        raise SettingError(name, "a text or a list of texts that are not empty", value)
    return tuple(dict.fromkeys(_text(name, item) for item in items))


def _questions(name: str, value: Any) -> Any:
    """The path of a file, or questions as such a file has them (pipeline.settings.questions looks at each)."""
    if value is None or isinstance(value, str | Path):
        return value if value is None else _text(name, value)
    with suppress(ValueError):
        if isinstance(value, list | tuple | Mapping):
            return json_copy(dict(value) if isinstance(value, Mapping) else value)
    raise SettingError(name, "a file or a list of questions", value)


def _columns(name: str, value: Any) -> tuple[str, ...]:
    """Names, also several in one text with commas."""
    parts = (part.strip() for item in _list(name, value) for part in item.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def _whole_or_auto(name: str, value: Any) -> int | str:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int)):
        raise SettingError(name, "a whole number or auto", value)
    return value


def _date(name: str, value: Any) -> str:
    """In ISO form; YAML reads 2026-11-28 as a date."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise SettingError(name, "a date like 2026-11-28", value) from None


def _switch(name: str, value: Any) -> str:
    """YAML reads a bare `on` or `off` as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else _text(name, value)


def _encoding(name: str, value: Any) -> str:
    """By the name that Python's codecs have for it."""
    try:
        "a".encode(value)  # of codecs only those of texts do that
        return codecs.lookup(value).name
    except (LookupError, TypeError, ValueError):
        raise SettingError(name, "an encoding that Python knows, like cp1252, shift_jis or utf-16", value) from None


def _shard(name: str, value: Any) -> str:
    index, slash, count = (value if isinstance(value, str) else "").partition("/")
    numbers = slash and index.isdecimal() and count.isdecimal() and len(index) < 10 and len(count) < 10
    if not numbers or int(index) >= int(count):
        raise SettingError(name, "i/n with 0 <= i < n", value)
    return f"{int(index)}/{int(count)}"


def _schema(name: str, value: Any) -> str:
    """A JSON Schema as JSON text, which the manifest, the fingerprint and the command line of a cluster can hold."""
    from pipeline.answers.schema import read_schema

    return _text(name, read_schema(value, flag(name)))


# By kind, the normal form of a value; "str" is stricter than elsewhere.
KINDS: dict[str, Callable[[str, Any], Any]] = {
    "str": _text,
    "map": _map,
    "list": _list,
    "texts": _texts,
    "stops": _stops,
    "questions": _questions,
    "columns": _columns,
    "auto_int": _whole_or_auto,
    "date": _date,
    "encoding": _encoding,
    "shard": _shard,
    "schema": _schema,
    "switch": _switch,
}
