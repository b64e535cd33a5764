"""Schemas of several kinds, whose answers come to an end within a few dozen tokens, and a tokenizer to hold them to."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from engine_models import TINY_READER

from pipeline.answers.schema import compile_schema
from pipeline.prompts.tokens import Tokens, load_tokens

SHORT = {"type": "string", "maxLength": 12}
YEAR = {"type": "integer", "minimum": 1900, "maximum": 2100}
ZONE = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "null"}]}
CODE = {"type": "string", "pattern": "^[a-z]{1,4}$"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "choice": {"enum": ["yes", "no", "not said"]},
    "number": {"type": "integer", "minimum": -20, "maximum": 1200},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "list": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
    "flat": {
        "type": "object",
        "properties": {"name": SHORT, "year": YEAR, "ok": {"type": "boolean"}},
        "required": ["name", "year", "ok"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["fire", "flood"]},
            "where": {
                "type": "object",
                "properties": {"plant": SHORT, "zone": ZONE},
                "required": ["plant", "zone"],
            },
            "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
        },
        "required": ["kind", "where", "parts"],
        "$defs": {"part": {"type": "object", "properties": {"id": CODE}, "required": ["id"]}},
    },
}  # fmt: skip


@lru_cache(maxsize=1)
def tokens() -> Tokens:
    return load_tokens(str(TINY_READER))


@lru_cache(maxsize=16)
def grammar(name: str) -> Any:
    return compile_schema(SCHEMAS[name]).grammar(tokens().tokenizer)
