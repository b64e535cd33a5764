"""What is wrong with a JSON Schema, where in it, and what to use instead.

The judges are the JSON Schema of JSON Schemas (package jsonschema) and llguidance, which refuses what it cannot hold an
output to. Here their refusals get a place, and what both would pass over in silence is refused: misspelt keywords, and
references to other files.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import nearest, one_line
from pipeline.results.columns import valid_text

Json = dict[str, Any]

TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
# Keywords whose values are schemas, lists of schemas, or schemas by name.
ONE = (
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
MANY = ("prefixItems", "anyOf", "allOf", "oneOf")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
DEFINITIONS = ("$defs", "definitions")
WITHIN_DEFINITIONS = tuple(f"#/{key}/" for key in DEFINITIONS)
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
# Others that mean something to an answer.
PLAIN = (
    "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems", "uniqueItems",
    "minContains", "maxContains", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$ref", "dependentRequired", "dependencies",
)  # fmt: skip
# Others that only tell people something.
REMARKS = (
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "discriminator", "contentEncoding", "contentMediaType",
)  # fmt: skip
KNOWN = (*ONE, *MANY, *NAMED, *PLAIN, *REMARKS)
INSTEAD = {
    "not": "say what is allowed, by enum, pattern or anyOf",
    "oneOf": "use anyOf, with a const in each alternative that tells them apart",
    "if": "use anyOf of two objects, with a const in each that tells them apart",
    "then": "use anyOf of two objects, with a const in each that tells them apart",
    "else": "use anyOf of two objects, with a const in each that tells them apart",
    "uniqueItems": "leave it out, or ask for an object with a boolean for each choice",
    "contains": "use prefixItems for places that are known, or a property of its own",
    "minContains": "use minItems",
    "maxContains": "use maxItems",
    "dependentRequired": "use anyOf of two objects, each with its own required",
    "dependentSchemas": "use anyOf of two objects",
    "dependencies": "use anyOf of two objects",
    "propertyNames": "use patternProperties with additionalProperties: false",
    "unevaluatedProperties": "use additionalProperties: false",
    "unevaluatedItems": "use items: false",
    "format": "use pattern",
    "pattern": "write the regular expression without look-around and back references",
    "nullable": 'use "type": ["string", "null"] and the like',
    "minProperties": "name the properties under required",
}


_NAME = '; the name of a value stands under properties: {"type": "object", "properties": {NAME: {"type": ...}}}'


def children(schema: Json) -> Iterator[tuple[str, Json]]:
    """(JSON pointer, subschema) of each schema that stands directly in `schema`; those that are true or false left out.

    Other than schemas in these places are left out, too.
    """
    for key, value in schema.items():
        if key in ONE and isinstance(value, dict):
            yield f"/{escaped(key)}", value
        elif (key in MANY or key == "items") and isinstance(value, list):
            yield from ((f"/{escaped(key)}/{i}", each) for i, each in enumerate(value) if isinstance(each, dict))
        elif key in NAMED and isinstance(value, dict):
            named = ((name, each) for name, each in value.items() if isinstance(each, dict))
            yield from ((f"/{escaped(key)}/{escaped(name)}", each) for name, each in named)


def escaped(name: str) -> str:
    """A name as JSON pointers have it (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def everywhere(schema: Json, pointer: str = "#") -> Iterator[tuple[str, Json]]:
    """(JSON pointer, schema) of the schema and of all that stand in it."""
    yield pointer, schema
    for below, each in children(schema):
        yield from everywhere(each, pointer + below)


def problem(schema: Json) -> str:
    """Why an output cannot be held to a well-formed schema: what, where, what to use instead. Empty if it can."""
    return _unsupported(schema) or _impossible(schema)


def malformed(schema: Json) -> str:
    """Why `schema` is no JSON Schema, or not one that can be read here: what, where, how to mend it. Empty if it is."""
    return _unreadable(schema) or _not_a_schema(schema) or _passed_over(schema)


def _unreadable(schema: Json) -> str:
    """What Python reads as JSON, and llguidance does not: at the first such value, by the order of the schema."""
    waiting: list[tuple[str, Any]] = [("#", schema)]
    while waiting:
        pointer, value = waiting.pop()
        inside: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            inside = [*value.items()]
        elif isinstance(value, list):
            inside = [*enumerate(value)]
        elif isinstance(value, float) and math.isnan(value):
            return f"{pointer}: NaN is not a number of JSON; leave it out"
        elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            return f"{pointer}: a number beyond 64-bit floats; give one that is nearer to 0, or leave it out"
        names = [key for key, _ in inside] if isinstance(value, dict) else [value]
        for text in names:
            if isinstance(text, str) and valid_text(text) != text:
                half = f"{one_line(repr(text), 80)} holds half of a surrogate pair, which UTF-8 cannot hold"
                return f"{pointer}: {half}; write both halves, or leave it out"
        waiting.extend((f"{pointer}/{escaped(str(key))}", each) for key, each in reversed(inside))
    try:
        grammar_text(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        return "#: it is nested too deeply" if "recursion" in str(error) else f"#: {one_line(error, 200)}"
    return ""


def _not_a_schema(schema: Json) -> str:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if schema.get("type") == "json_schema":
        return (
            "#: this is a response_format of OpenAI's; give the schema in it alone, which stands at /json_schema/schema"
        )
    draft = schema.get("$schema", "")
    if not isinstance(draft, str):
        expected = f"the address of a draft of JSON Schema, like {Draft202012Validator.META_SCHEMA['$id']}"
        return f"#/$schema: not JSON Schema: expected {expected}, got {one_line(repr(draft), 80)}; or leave it out"
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        at = "#" + "".join(f"/{escaped(str(part))}" for part in error.absolute_path)
        message = one_line(error.message, 200)
        if at.endswith("/type") and isinstance(error.instance, str):
            message = (
                f"{error.instance!r} is no type{nearest(error.instance, TYPES) or '; they are ' + ', '.join(TYPES)}"
            )
        return f"{at}: not JSON Schema: {message}"
    except RecursionError:
        return "#: it is nested too deeply"
    return ""


def _passed_over(schema: Json) -> str:
    for pointer, each in everywhere(schema):
        for key in each:
            if key not in KNOWN and (not key.startswith("x-") or key == "x-guidance"):
                hint = f"; {INSTEAD[key]}" if key in INSTEAD else nearest(key, KNOWN) or _NAME
                return f"{pointer}/{escaped(key)}: not a keyword of JSON Schema{hint}"
        reference = each.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            return f"{pointer}/$ref: {reference!r} is elsewhere; put it into $defs, and refer to it as #/$defs/NAME"
    return ""


def _unsupported(schema: Json) -> str:
    if not refusal(schema):
        return ""
    definitions = {key: schema[key] for key in DEFINITIONS if key in schema}
    pointer, found = "#", schema
    while True:  # down to the smallest part that is refused
        below = ((at, each) for at, each in children(found) if refusal({**definitions, **each}))
        at, each = next(below, ("", {}))
        if not at:
            break
        pointer, found = pointer + at, each
    message = refusal({**definitions, **found})
    missing = re.search("required property '(.+)' is unsatisfiable", message)
    properties = found.get("properties", {})
    if missing and missing[1] not in properties:
        return f"{pointer}/required: {missing[1]!r} is not under properties{nearest(missing[1], properties)}"
    keyword = _keyword(message, found)
    hint = f"; {INSTEAD[keyword]}" if keyword in INSTEAD else ""
    return f"{pointer}{f'/{keyword}' if keyword in found else ''}: {_in_words(message, keyword)}{hint}"


def _impossible(schema: Json) -> str:
    """A part that no value fits: a property that is not required, say, of which llguidance just makes no use."""
    for pointer, each in everywhere(schema):
        if "$ref" not in each and not any(children(each)):
            message = refusal(each)
            if message:
                return f"{pointer}: {_in_words(message, '')}"
    return ""


def dead_end(schema: Json) -> str:
    """A part for which llguidance finds no number, though it takes it: bounds and multipleOf in several parts, say.

    Empty if there is none. Not known of a part that refers elsewhere than into the definitions.
    """
    from llguidance import LLMatcher, LLTokenizer

    definitions = {key: schema[key] for key in DEFINITIONS if key in schema}
    tokens = LLTokenizer("byte")
    for pointer, each in everywhere(schema):
        if not ({"allOf", "multipleOf"} & set(each) or ("$ref" in each and BOUNDS & set(each))):
            continue
        references = [part["$ref"] for _, part in everywhere(each) if "$ref" in part]
        if not all(text.startswith(WITHIN_DEFINITIONS) for text in references):
            continue
        matcher = LLMatcher(tokens, grammar_text(json.dumps({**definitions, **each})), log_level=0)
        if matcher.is_error():
            continue
        matcher.compute_logit_bias()
        if matcher.is_error():
            return f"{pointer}: no output can be held to its bounds and multipleOf together; give them in one schema"
    return ""


def _keyword(message: str, schema: Json) -> str:
    """The keyword that a refusal is about; empty if it names none."""
    unimplemented = re.match(r'Unimplemented keys: \["([^"]+)"', message)
    if unimplemented:
        return unimplemented[1]
    if message.startswith("Unknown format"):
        return "format"
    if message.startswith("regex parse error"):
        return "pattern"
    return "oneOf" if message.startswith("oneOf") else ""


def _in_words(message: str, keyword: str) -> str:
    if keyword and message.startswith(("Unimplemented", "oneOf")):
        return "no output can be held to this keyword"
    if keyword == "pattern":
        return f"a regular expression that cannot be held to: {one_line(message.rpartition('error: ')[2], 120)}"
    return one_line(message[:1].lower() + message[1:], 200)


def refusal(schema: Mapping[str, Any]) -> str:
    """llguidance's word on what it cannot hold an output to; empty if it can."""
    from llguidance import LLMatcher

    found, messages = LLMatcher.validate_grammar_with_warnings(grammar_text(json.dumps(schema)))
    return messages[0] if found or messages else ""


def grammar_text(schema: str) -> str:
    """A schema as llguidance's grammar: JSON on one line, spaced as models have seen it most often.

    Were white space free, a model could write it until its tokens end.
    """
    from llguidance import LLMatcher

    style: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return LLMatcher.grammar_from_json_schema(schema, overrides=style)
