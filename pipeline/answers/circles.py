"""Schemas that need themselves: no value begins or none ends. llguidance takes them, then fails at each output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.answers.checks import Json, everywhere
from pipeline.answers.typed import target


@dataclass(frozen=True)
class Need:
    """A value of a schema needs one of another, of one of `schemas`.

    keyword: that says so. inside: what in the value must be of them; empty: the value itself. mend: how to need less.
    """

    keyword: str
    schemas: tuple[Any, ...]
    inside: str = ""
    mend: str = ""

    def met(self, known: set[int]) -> bool:
        """Whether one of the schemas is among the known, by id, or is true or false, and so in no circle."""
        return any(not isinstance(each, dict) or id(each) in known for each in self.schemas)


def circle(root: Json) -> str:
    """Where a schema needs itself, why that cannot be, how to mend it. Empty if it does nowhere.

    What may lead back to itself, and may also do without (an optional property, a list that may be empty, null as an
    alternative), is no such circle.
    """
    places = _places(root)
    needs = {key: list(_needs(each, root)) for key, (_, each) in places.items()}
    # Also an alternative that leads back without a value around it: whoever follows it comes to no end.
    same = {
        key: [Need(need.keyword, (each,)) for need in found if not need.inside for each in need.schemas]
        for key, found in needs.items()
    }
    for key, need in _circle(same):
        if need.keyword == "$ref":
            pointer, schema = places[key]
            return (
                f"{pointer}/$ref: {schema['$ref']!r} leads back here before a value has begun, so that it says "
                "nothing; leave it out, or let it stand in properties or items"
            )
    for key, need in _circle(needs):
        if need.inside:
            return (
                f"{places[key][0]}/{need.keyword}: {need.inside} leads back here, so that no answer could end; "
                f"{need.mend}, or allow null beside what leads back, by anyOf"
            )
    return ""


def _places(root: Json) -> dict[int, tuple[str, Json]]:
    """By id, (JSON pointer, schema) of the schema and of all in it, those where only references lead included."""
    found: dict[int, tuple[str, Json]] = {}
    waiting: list[tuple[str, Any]] = [("#", root)]
    while waiting:
        pointer, schema = waiting.pop()
        if not isinstance(schema, dict) or id(schema) in found:
            continue
        for at, each in everywhere(schema, pointer):
            found[id(each)] = (at, each)
            if "$ref" in each:
                waiting.append((each["$ref"], target(each["$ref"], root)))
    return found


def _needs(schema: Json, root: Json) -> Iterator[Need]:
    if "enum" in schema or "const" in schema:
        return
    if "$ref" in schema:
        yield Need("$ref", (target(schema["$ref"], root),))
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            yield Need(keyword, tuple(schema[keyword]))
    for each in schema.get("allOf", ()):
        yield Need("allOf", (each,))
    if schema.get("type") in ("object", ["object"]):
        yield from _of_object(schema)
    if schema.get("type") in ("array", ["array"]):
        yield from _of_list(schema)


def _of_object(schema: Json) -> Iterator[Need]:
    named: Mapping[str, Any] = schema.get("properties", {})
    others = (*schema.get("patternProperties", {}).values(), schema.get("additionalProperties", True))
    for name in schema.get("required", ()):
        yield Need(
            "required", (named[name],) if name in named else others, f"{name!r}", f"take {name!r} out of required"
        )
    if schema.get("minProperties", 0) > 0:
        yield Need("minProperties", (*named.values(), *others), "each property", "leave minProperties out")


def _of_list(schema: Json) -> Iterator[Need]:
    items = schema.get("items", True)
    first, other = (items, schema.get("additionalItems", True)) if isinstance(items, list) else ((), items)
    first = [*schema.get("prefixItems", first), other]
    for each in first[: int(schema.get("minItems", 0))]:
        yield Need("minItems", (each,), "an item", "leave minItems out")


def _circle(needs: Mapping[int, list[Need]]) -> list[tuple[int, Need]]:
    """The steps of a circle: (a schema's id, what it needs of the next). Empty if none needs itself."""
    known: set[int] = set()
    left = list(needs)[::-1]  # what stands in a schema comes behind it
    count = -1
    while count != len(left):
        count = len(left)
        for key in left:
            if all(need.met(known) for need in needs[key]):
                known.add(key)
        left = [key for key in left if key not in known]
    if not left:
        return []
    steps: dict[int, Need] = {}
    at = left[-1]
    while at not in steps:
        steps[at] = next(need for need in needs[at] if not need.met(known))
        at = id(steps[at].schemas[0])
    return list(steps.items())[list(steps).index(at) :]
