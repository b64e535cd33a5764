"""A JSON Schema that answers are held to: read, checked, closed; and answers parsed by it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.answers.checks import dead_end, everywhere, malformed, problem
from pipeline.answers.circles import circle
from pipeline.answers.multiples import checked, narrow
from pipeline.answers.typed import JSON, MisfitError, Typed, json_text, typed
from pipeline.errors import JobError, one_line

if TYPE_CHECKING:
    from pipeline.answers.grammar import Grammar

# A schema beyond that is a mistake: a data file, say.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class AnswerError:
    """Why a text is no answer by its schema; `reason` is a part of a sentence about the answer."""

    reason: str


@dataclass(frozen=True)
class Schema:
    """A checked schema. text: it as JSON, objects closed (`compile_schema`)."""

    text: str

    @cached_property
    def _root(self) -> dict[str, Any]:
        return json.loads(self.text)

    @cached_property
    def _typed(self) -> Typed:
        return typed(self._root, self._root)

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import Draft202012Validator, extend, validator_for

        kind = extend(validator_for(self._root, default=Draft202012Validator), {"multipleOf": checked})
        root = json.loads(self.text)
        for _, each in everywhere(root):
            each.pop("$schema", None)  # at each it would take a validator of its own, which knows no `checked`
        return kind(root)

    @property
    def arrow_type(self) -> pa.DataType:
        """Of a column of its answers: struct, list, string, int64, float64 or bool; string for JSON text."""
        return self._typed.arrow

    def grammar(self, tokenizer: Any, eos_ids: tuple[int, ...] = ()) -> Grammar:
        """What holds an engine's output to the schema. tokenizer: of transformers. Raises JobError."""
        from pipeline.answers.grammar import Grammar

        return Grammar(self.text, tokenizer, eos_ids)

    def parse(self, text: str, as_type: bool = True) -> Any:
        """The answer that a text is, as a value of arrow_type, or of JSON text unless `as_type`; else an AnswerError.

        An answer that is null is None.
        """
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except ValueError as error:
            return AnswerError(f"is not JSON: {one_line(error, 100)}")
        except RecursionError:
            return AnswerError("is nested too deeply")
        try:
            wrong = next(iter(self._validator.iter_errors(value)), None)
            if wrong is not None:
                return AnswerError(f"does not fit the schema at {wrong.json_path}: {one_line(wrong.message, 200)}")
            return self._typed.value(value) if as_type else json_text(value)
        except MisfitError as misfit:
            return AnswerError(f"does not fit its column: {misfit}")
        except RecursionError:
            return AnswerError("is nested too deeply")

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text}  # the rest is made anew where it is needed


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def compile_schema(schema: Mapping[str, Any] | str, origin: str = "--schema") -> Schema:
    """A schema, or its JSON text, checked; the same object for the same text.

    Of what the schema allows, answers are what it means: what has `properties` and no `type` is an object, and it has
    no other properties unless the schema speaks of them; what has `items` is a list. Raises JobError, one line: what is
    wrong, where (a JSON pointer), what to use instead. origin: what the message begins with.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise JobError(f"{origin}: not JSON: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise JobError(f'{origin}: a JSON Schema is an object like {{"type": "object"}}, got {one_line(text, 80)}')
    found, wrong = _compiled(json.dumps(value, ensure_ascii=False))
    if wrong:
        raise JobError(f"{origin}: {wrong}")
    assert found is not None
    return found


@lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[Schema | None, str]:
    value = json.loads(text)
    wrong = malformed(value)
    if not wrong:
        for _, each in everywhere(value):
            narrow(each)
        wrong = problem(value)
    if wrong:
        return None, wrong
    _close(value)
    wrong = problem(value) or circle(value) or dead_end(value)
    return (None, wrong) if wrong else (Schema(json.dumps(value, ensure_ascii=False)), "")


def _close(root: dict[str, Any]) -> None:
    """Give objects that list their properties no others, and say that they are objects, and lists lists.

    Not where schemas are combined: then the properties of one are others to another.
    """
    found = [each for _, each in everywhere(root)]
    others = {"anyOf", "oneOf", "$ref"}
    combined = any("allOf" in each or ("properties" in each and others & set(each)) for each in found)
    for each in found if not combined else ():
        for key, kind in (("properties", "object"), ("items", "array")):
            if key in each and not {"type", "enum", "const", "$ref", "anyOf", "oneOf"} & set(each):
                each["type"] = kind
        if "properties" in each and not {"additionalProperties", "patternProperties"} & set(each):
            each["additionalProperties"] = False


def read_schema(value: Any, origin: str = "--schema") -> str:
    """The JSON text of a schema that is given as a file's path, as JSON text, as a mapping, or as a pydantic model.

    Raises JobError for what cannot be read, and as compile_schema().
    """
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str | Path):
        text = str(value)
        if not text.lstrip().startswith("{"):
            origin = f"{origin} {text}"
            text = _file(Path(text), origin)
        value = text
    elif not isinstance(value, Mapping):
        raise JobError(
            f"{origin} must be a file with a JSON Schema, the schema itself, or a pydantic model class, "
            f"got {type(value).__name__}"
        )
    compile_schema(value, origin)
    return json.dumps(json.loads(value) if isinstance(value, str) else dict(value), ensure_ascii=False)


def _file(path: Path, origin: str) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise JobError(f"{origin}: more than {MOST_BYTES:,} bytes; is it a JSON Schema?")
        return path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise JobError(f"{origin}: cannot be read: {one_line(error)}") from None


def answer_type(schemas: Iterable[Schema]) -> pa.DataType | None:
    """Of the column `answer` of rows with these schemas: that of all if it is one, else string, for JSON text.

    None if there is no schema.
    """
    kinds = {schema.arrow_type for schema in schemas}
    return JSON.arrow if len(kinds) > 1 else next(iter(kinds), None)
