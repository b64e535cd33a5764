"""Schemas at the edges: decimals by multipleOf, schemas that need themselves, values that no JSON reader holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_models import TINY_READER
from schemas import tokens

from jobs.summarize import main
from pipeline.answers.schema import AnswerError, compile_schema
from pipeline.errors import JobError

CENTS = {"type": "number", "multipleOf": 0.01}
PRICES = {
    "type": "object",
    "properties": {"all": {"type": "array", "items": {"$ref": "#/$defs/cents"}}},
    "$defs": {"cents": {"$schema": "https://json-schema.org/draft/2020-12/schema", **CENTS}},
}


def fits(schema: dict[str, Any], text: str) -> bool:
    return not isinstance(compile_schema(schema).parse(text), AnswerError)


def may_come(schema: dict[str, Any], text: str) -> bool:
    """Whether an output held to the schema can be `text`."""
    matcher = compile_schema(schema).grammar(tokens().tokenizer).matcher()
    for token in tokens().encode_data(text).tolist():
        matcher.take(token)
    return matcher.complete and not matcher.error


def test_every_amount_of_cents_is_a_multiple_of_one() -> None:
    wrong = [i for i in range(20_000) if not fits(CENTS, f"{i // 100}.{i % 100:02d}")]
    assert not wrong
    assert fits(PRICES, '{"all": [78.74, 19.99, 0.29, -0.29]}')
    assert not fits(PRICES, '{"all": [78.745]}')
    assert fits({"$schema": "http://json-schema.org/draft-07/schema#", **CENTS}, "19.99")


@pytest.mark.parametrize(
    ("factor", "text", "fitting"),
    [
        (0.01, "1.005", False), (0.01, "0.30000000000000004", False), (0.01, "1e-300", False), (0.01, "1e308", True),
        (0.01, "-0.0", True), (0.01, "1" + "0" * 400 + ".5", False), (0.25, "1234567890123456.75", True),
        (0.001, "123456789012.345", True), (3, "1" + "0" * 300, False), (3, "3" + "0" * 300, True), (1.5, "4.5", True),
        (1.5, "4", False), (1e-05, "0.00001", True), (1e-05, "0.000015", False),
    ],
)  # fmt: skip
def test_multiples_are_exact_at_any_size(factor: float, text: str, fitting: bool) -> None:
    assert fits({"type": "number", "multipleOf": factor}, text) == fitting


@pytest.mark.parametrize(
    ("bounds", "few", "outside"),
    [
        ({"minimum": 0.285, "maximum": 0.295}, ["0.29"], "0.28"),
        ({"exclusiveMinimum": 0.28, "exclusiveMaximum": 0.3}, ["0.29"], "0.3"),
        ({"minimum": 0.29, "maximum": 0.29}, ["0.29"], "0.3"),
        ({"minimum": 0.281, "maximum": 0.3099}, ["0.29", "0.3"], "0.31"),
        ({"exclusiveMinimum": -0.305, "maximum": -0.255}, ["-0.29", "-0.28", "-0.26"], "-0.31"),
    ],
)
def test_multiples_between_bounds_of_more_decimals_can_come(
    bounds: dict[str, float], few: list[str], outside: str
) -> None:
    for text in few:
        assert may_come(CENTS | bounds, text)
        assert fits(CENTS | bounds, text)
    assert not may_come(CENTS | bounds, outside)
    assert not fits(CENTS | bounds, outside)
    assert may_come(CENTS | bounds | {"type": ["number", "null"]}, "null")


def test_whole_numbers_by_a_fraction() -> None:
    by = {"type": "integer", "multipleOf": 1.5, "minimum": 3.5, "maximum": 8}
    assert may_come(by, "6")
    assert not may_come(by, "5")


A_LIST = {"type": "array", "items": {"$ref": "#"}}
NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {}}, "required": ["v", "next"]}


def node(**after: Any) -> dict[str, Any]:
    """A list of linked nodes, by what stands behind each."""
    return {"$ref": "#/$defs/node", "$defs": {"node": NODE | {"properties": NODE["properties"] | {"next": after}}}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, r"#/\$ref: '#' leads back here before a value has begun.*properties or items"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, r"#/anyOf/0/\$ref: '#' leads back"),
        ({"allOf": [{"$ref": "#"}]}, r"#/allOf/0/\$ref: '#' leads back"),
        ({"properties": {"x": {"$ref": "#/$defs/a"}},
          "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
         r"#/\$defs/(a|b/anyOf/0)/\$ref: '.*' leads back"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
         "#/required: 'a' leads back here, so that no answer could end; take 'a' out of required, or allow null"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#/required: 'a' leads back"),
        (node(**{"$ref": "#/$defs/node"}), r"#/\$defs/node/required: 'next' leads back"),
        ({"properties": {"free": {"type": "string"}, "list": {"$ref": "#/$defs/node"}},
          "$defs": node(**{"$ref": "#/$defs/node"})["$defs"]}, r"#/\$defs/node/required: 'next' leads back"),
        (A_LIST | {"minItems": 1}, "#/minItems: an item leads back here.*leave minItems out"),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "#/minItems: an item leads back"),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "#/minProperties: each"),
        ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"$ref": "#/$defs/a%20b"}}}, r"#/\$ref|#/\$defs/a b/\$ref"),
    ],
)  # fmt: skip
def test_what_needs_itself_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=f"^--schema: ({message})") as refused:
        compile_schema(schema)
    assert len(str(refused.value)) < 400


NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (A_LIST, "[[], [[]]]"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, '{"a": {}}'),
        (node(anyOf=[{"$ref": "#/$defs/node"}, NULL]), '{"v": 1, "next": {"v": 2, "next": null}}'),
        ({"$defs": {"tree": {"type": "object", "required": ["kids"],
                             "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}},
          "$ref": "#/$defs/tree"}, '{"kids": [{"kids": []}]}'),
        ({"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1}, "[[null]]"),
        ({"type": "object", "additionalProperties": {"$ref": "#"}}, '{"a": {"b": {}}}'),
        ({"anyOf": [{"type": "integer"}, {"type": "array", "minItems": 2, "items": {"$ref": "#"}}]}, "[1, [2, 3]]"),
        ({"type": "object", "required": ["a", "b"],
          "properties": {"a": {"$ref": "#/$defs/x"}, "b": {"$ref": "#/$defs/x"}}, "$defs": {"x": NULL}},
         '{"a": null, "b": null}'),
    ],
)  # fmt: skip
def test_what_may_do_without_itself_is_taken(schema: dict[str, Any], text: str) -> None:
    assert fits(schema, text)
    assert may_come(schema, text)


def test_an_answer_that_is_too_deep_for_the_validator_says_so() -> None:
    found = compile_schema(A_LIST).parse("[" * 900 + "]" * 900)
    assert found == AnswerError("is nested too deeply")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": "number", "default": NaN}', "#/default: NaN is not a number of JSON; leave it out"),
        ('{"type": "integer", "maximum": 1e400}', "#/maximum: a number beyond 64-bit floats; give one that is nearer"),
        ('{"type": "integer", "minimum": -1' + "0" * 400 + "}", "#/minimum: a number beyond 64-bit floats"),
        ('{"enum": [1, Infinity]}', "#/enum/1: a number beyond 64-bit floats"),
        ('{"const": "\\ud800"}', r"#/const: '\\ud800' holds half of a surrogate pair"),
        ('{"properties": {"\\ud800": {}}}', r"#/properties: '\\ud800' holds half of a surrogate pair"),
        ('{"$schema": 5, "type": "string"}', r"#/\$schema: not JSON Schema: expected the address.*got 5"),
        ('{"$schema": ["x"], "type": "string"}', r"#/\$schema: not JSON Schema: expected the address"),
        ('{"allOf": [{"type": "number", "multipleOf": 0.01}, {"minimum": 0.285, "maximum": 0.295}]}',
         "#: no output can be held to its bounds and multipleOf together; give them in one schema"),
        ('{"type": "integer", "multipleOf": 0.3, "minimum": -2.8, "maximum": -1}', "#: .*multipleOf"),
        ('{"type": "number", "multipleOf": 7, "minimum": 1.7976931348623157e308, "maximum": 1e308}', "#: "),
        ('{"properties": {"a": ' * 70 + "{}" + "}}" * 70, "#: it is nested too deeply"),
        ('{"default": ' + "[" * 900 + "]" * 900 + "}", "#: it is nested too deeply"),
    ],
)  # fmt: skip
def test_odd_schemas_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"^--schema: {message}") as refused:
        compile_schema(text)
    assert str(refused.value).isprintable()
    with pytest.raises(JobError, match=f"^--schema: {message}"):
        compile_schema(json.loads(text))  # as jobs.batch hands over a response_format
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "d.txt").write_text("A text.")
    flags = [
        "--input", str(tmp_path / "d.txt"), "--output", str(tmp_path / "out"), "--model", str(TINY_READER),
        "--question", "Why?", "--schema", str(tmp_path / "a.json"), "--dry-run",
    ]  # fmt: skip
    with pytest.raises(JobError, match=r"a\.json: #"):
        main(flags)
