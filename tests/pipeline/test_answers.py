"""Typed answers: schemas that are refused and why, types of the column, parsing, and whole runs by a schema."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from engine_models import TINY_READER
from schemas import SCHEMAS

from jobs.cli import Parser
from jobs.submit import split_arguments
from pipeline import StemlineStage, read_results, summarize
from pipeline.answers.schema import AnswerError, answer_type, compile_schema, read_schema
from pipeline.errors import JobError
from pipeline.job.dry_run import describe_plan
from pipeline.job.job import run
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.tokens import load_tokens
from pipeline.settings.config import JobConfig

FAKE = "fake_engine:FakeEngine"
HERE: dict[str, Any] = {"model": TINY_READER, "device": "cpu", "arena_tokens": 8192}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "obj"}, "#/type: not JSON Schema: 'obj' is no type; they are string, integer"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "#: this is a response_format of OpenAI"),
        ({"type": "numbr"}, "#/type: not JSON Schema: 'numbr' is no type; did you mean 'number'"),
        ({"plant": "string"}, '#/plant: not a keyword .* stands under properties: {"type": "object"'),
        ({"properties": {"cost": {}}, "required": ["csot"]}, "#/required: 'csot' is not under properties.*'cost'"),
        ({"properties": {"a": {"minimun": 3}}}, r"#/properties/a/minimun: not a keyword.*did you mean 'minimum'"),
        ({"properties": {"a/b~": {"nullable": True}}}, r'#/properties/a~1b~0/nullable: .*use "type": \["string"'),
        ({"items": {"type": "array", "uniqueItems": True}}, r"#/items/uniqueItems: no output can be held .*a boolean"),
        ({"anyOf": [{"type": "string"}, {"not": {}}]}, r"#/anyOf/1/not: .*say what is allowed"),
        ({"$defs": {"A": {"contains": {}}}, "items": {"$ref": "#/$defs/A"}}, r"#/\$defs/A/contains: .*prefixItems"),
        ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "#/oneOf: .*use anyOf, with a const"),
        ({"type": "object", "if": {}, "then": {}}, "#/if: .*use anyOf of two objects"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#/dependentRequired: .*its own required"),
        ({"properties": {"d": {"type": "string", "format": "colour"}}}, "#/properties/d/format: .*colour; use pattern"),
        ({"type": "string", "pattern": "^(?=a)b"}, "#/pattern: a regular expression .* without look-around"),
        ({"type": "string", "pattern": "("}, "#/pattern: not JSON Schema"),
        ({"properties": {"n": {"type": "integer", "minimum": 5, "maximum": 2}}}, "#/properties/n: unsatisfiable"),
        ({"properties": {"s": {"enum": []}}, "required": ["s"]}, "#/properties/s: unsatisfiable"),
        ({"enum": []}, "#: unsatisfiable|#/enum: not JSON Schema"),
        ({"$ref": "https://example.com/a.json"}, r"#/\$ref: .* is elsewhere; put it into \$defs"),
        ({"properties": {"x": {"$ref": "#/$defs/none"}}}, "#/properties/x: .*does not exist"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "#/x-guidance: not a keyword"),
        ("[1]", "a JSON Schema is an object"),
        ("{", "not JSON"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_in_one_line(schema: Any, message: str) -> None:
    with pytest.raises(JobError, match=f"^--schema: ({message})") as refused:
        compile_schema(schema)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_what_is_told_people_and_keys_of_their_own_do_no_harm() -> None:
    schema = {"title": "T", "type": "string", "description": "d", "x-order": 3, "examples": ["a"], "maxLength": 3}
    assert compile_schema(schema).arrow_type == pa.string()


NULLABLE = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}}}}}


@pytest.mark.parametrize(
    ("schema", "arrow", "text", "value"),
    [
        ({"enum": ["a", "b"]}, pa.string(), '"a"', "a"),
        ({"enum": [1, 2.5]}, pa.float64(), "1", 1.0),
        ({"enum": ["a", 1]}, pa.string(), '"a"', '"a"'),
        ({"const": True}, pa.bool_(), "true", True),
        ({"type": "integer"}, pa.int64(), "-7", -7),
        ({"type": "integer"}, pa.int64(), "7.0", 7),
        ({"type": "number"}, pa.float64(), "7", 7.0),
        ({"type": ["number", "null"]}, pa.float64(), "null", None),
        ({"type": "string"}, pa.string(), '"\\ud800 \\u00e4"', "\\ud800 ä"),
        (NULLABLE, pa.int64(), "3", 3),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, pa.string(), "3", "3"),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, pa.string(), '"x"', '"x"'),
        ({"type": "array", "items": NULLABLE}, pa.list_(pa.int64()), "[1, null]", [1, None]),
        ({"type": "array"}, pa.string(), "[1]", "[1]"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, pa.string(), '{"ä": 1}', '{"ä": 1}'),
        ({"type": "object", "properties": {}}, pa.string(), "{}", "{}"),
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": True}, pa.string(), '{"b": 1}', '{"b": 1}'),
        ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}},
         pa.struct([("a", pa.int64()), ("b", pa.string())]), '{"b": {"c": [1]}}', {"a": None, "b": '{"c": [1]}'}),
        (TREE, pa.struct([("t", pa.string())]), '{"t": {"t": {}}}', {"t": '{"t": {}}'}),
        ({"allOf": [{"type": "integer"}]}, pa.int64(), "1", 1),
    ],
)  # fmt: skip
def test_types_and_values_of_answers(schema: dict[str, Any], arrow: pa.DataType, text: str, value: Any) -> None:
    compiled = compile_schema(schema)
    assert compiled.arrow_type == arrow
    assert compiled.parse(text) == value
    assert pa.array([compiled.parse(text)], compiled.arrow_type).to_pylist() == [value]
    assert pickle.loads(pickle.dumps(compiled)).parse(text) == value
    as_text = compiled.parse(text, as_type=False)
    assert json.loads(as_text) == json.loads(text)


@pytest.mark.parametrize(
    ("schema", "text", "reason"),
    [
        ({"type": "integer"}, "1" + "0" * 30, "does not fit its column: it holds a whole number of more than 64 bits"),
        ({"type": "number"}, "1e999", "beyond 64-bit floats"),
        ({"type": "number"}, "1" + "0" * 400, "beyond 64-bit floats"),
        ({"type": "number"}, "NaN", "is not JSON: NaN"),
        ({"type": "integer", "maximum": 5}, "7", "does not fit the schema at $: 7"),
        ({"properties": {"a": {"maxLength": 1}}}, '{"a": "xy"}', "at $.a"),
        ({"type": "string"}, '"cut', "is not JSON"),
        ({"type": "string"}, "", "is not JSON"),
        ({}, "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_answer_says_why(schema: dict[str, Any], text: str, reason: str) -> None:
    found = compile_schema(schema).parse(text)
    assert isinstance(found, AnswerError)
    assert reason in found.reason


def test_objects_that_name_their_keys_have_no_others_unless_schemas_are_combined() -> None:
    named = {"properties": {"a": {"type": "integer"}}}
    assert isinstance(compile_schema(named).parse('{"a": 1, "b": 2}'), AnswerError)
    assert isinstance(compile_schema(named).parse("3"), AnswerError), "what has properties is an object"
    assert compile_schema({"items": {"type": "integer"}}).arrow_type == pa.list_(pa.int64())
    both = {"allOf": [named, {"properties": {"b": {"type": "integer"}}}]}
    assert json.loads(compile_schema(both).parse('{"a": 1, "b": 2}')) == {"a": 1, "b": 2}


def test_rows_of_several_schemas_share_a_type_or_are_json_text() -> None:
    whole, text = compile_schema({"type": "integer"}), compile_schema({"type": "string"})
    assert answer_type([whole, compile_schema({"type": "integer", "minimum": 0})]) == pa.int64()
    assert answer_type([whole, text]) == pa.string()
    assert answer_type([]) is None
    assert (whole.parse("3", as_type=False), text.parse('"a"', as_type=False)) == ("3", '"a"')


def test_a_schema_is_a_file_a_mapping_a_text_or_a_pydantic_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Finding(pydantic.BaseModel):
        what: str
        cost: float | None = None

    of_model = read_schema(Finding)
    assert compile_schema(of_model).arrow_type == pa.struct([("what", pa.string()), ("cost", pa.float64())])
    (tmp_path / "a.json").write_text(json.dumps(SCHEMAS["flat"]))
    monkeypatch.chdir(tmp_path)
    given = ["a.json", Path("a.json"), SCHEMAS["flat"], json.dumps(SCHEMAS["flat"])]
    assert len({config(schema=each).schema for each in given}) == 1
    assert config(schema=Finding).schema == of_model
    for wrong, message in [
        ("none.json", "--schema none.json: cannot be read"), (3, "--schema must be a file"), (str, "got type"),
        ({"not": {}}, "--schema: #/not"),
    ]:  # fmt: skip
        with pytest.raises(JobError, match=message):
            config(schema=wrong)


def config(**settings: Any) -> JobConfig:
    return JobConfig(**({"input": ("docs",), "output": "out", "model": str(TINY_READER)} | settings))


def test_the_schema_and_the_order_of_its_keys_are_in_the_fingerprint() -> None:
    one, other = ({"properties": {name: {"type": "integer"} for name in names}} for names in ("ab", "ba"))
    assert len({each.fingerprint() for each in (config(), config(schema=one), config(schema=other))}) == 3
    assert config(schema=one).fingerprint() == config(schema=json.loads(json.dumps(one))).fingerprint()


def test_thinking_and_a_schema_are_refused_together() -> None:
    with pytest.raises(JobError, match=r"--schema with --thinking on: .*leave one of them out"):
        config(schema=SCHEMAS["choice"], thinking="on")


@pytest.mark.parametrize("ending", ["<think>\n", "{# <|channel|> #}"], ids=["opens thinking", "channels"])
def test_a_model_that_always_thinks_is_refused(ending: str) -> None:
    tokens = load_tokens(str(TINY_READER))
    builder = PromptBuilder(tokens, make_task("ask", "Why?", None))
    builder.check_answers()
    tokens.tokenizer.chat_template += ending
    with pytest.raises(JobError, match="--schema: this model always thinks"):
        PromptBuilder(tokens, make_task("ask", "Why?", None), thinking="auto").check_answers()


def test_submit_sends_the_schema_itself_and_refuses_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.cli import add_job_flags

    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(SCHEMAS["choice"]))
    Path("bad.json").write_text('{"type": "string", "format": "colour"}')
    parser = Parser(prog="x", allow_abbrev=False)
    add_job_flags(parser)
    parser.add_argument("--address")
    parser.add_argument("--no-wait", action="store_true")
    common = ["--input", "docs", "--output", "out", "--model", str(TINY_READER), "--schema"]
    _, flags = split_arguments(parser, [*common, "a.json"])
    (sent,) = [each.partition("=")[2] for each in flags if each.startswith("--schema=")]
    assert json.loads(sent) == SCHEMAS["choice"]
    again = parser.parse_args(flags)
    assert config(schema=again.schema).schema == config(schema="a.json").schema
    with pytest.raises(JobError, match=r"--schema bad\.json: #/format"):
        split_arguments(parser, [*common, "bad.json"])


TEXTS = {f"d{i}": f"Report {i}. Key finding: the pump of line {i} failed twice. " * (i + 1) for i in range(5)}


def test_answers_come_as_a_typed_column_beside_their_text() -> None:
    table = summarize(TEXTS, schema=SCHEMAS["nested"], max_new_tokens=120, temperature=1.2, **HERE)
    assert table["status"].to_pylist() == ["ok"] * 5
    assert table.schema.field("answer").type == compile_schema(SCHEMAS["nested"]).arrow_type
    assert table.schema.field("answer").metadata[b"meaning"].startswith(b"the output as a value")
    outputs, answers = table["output"].to_pylist(), table["answer"].to_pylist()
    assert [json.loads(text) for text in outputs] == answers
    assert len({json.dumps(answer) for answer in answers}) > 1
    assert table["answer_error"].null_count == 5
    again = summarize(
        dict(reversed(TEXTS.items())), schema=SCHEMAS["nested"], max_new_tokens=120, temperature=1.2, **HERE
    )
    assert again["output"].to_pylist() == outputs[::-1]


def test_questions_may_have_schemas_of_their_own() -> None:
    """Of different types: JSON text, beside answers without a schema; of one type: that. Bad ones load no model."""
    choice, number = {"enum": ["x", "yy"]}, {"type": "integer", "minimum": 0, "maximum": 50}
    free = {"name": "free", "question": "List the key findings in order."}
    asked = [
        {"name": "a", "question": "Which?", "schema": choice},
        {"name": "b", "question": "Many?", "schema": number},
    ]
    rows = summarize(["A text."], questions=[*asked, free], **HERE).to_pylist()
    assert [row["question_id"] for row in rows] == ["a", "b", "free"]
    assert {row["status"] for row in rows} == {"ok"}
    assert json.loads(rows[0]["answer"]) in choice["enum"]
    assert 0 <= json.loads(rows[1]["answer"]) <= 50
    assert rows[0]["answer"] == rows[0]["output"]
    assert rows[2]["answer"] is None
    table = summarize(["A text."], questions=[asked[0], {**asked[1], "schema": choice}, free], **HERE)
    assert table["answer"][0].as_py() in choice["enum"]
    bad = [{"name": "a", "question": "Which?", "schema": {"type": "string", "format": "colour"}}]
    with pytest.raises(JobError, match="question a: schema: #/format"):
        summarize(["A text."], questions=bad, **(HERE | {"model": "nowhere"}))
    with pytest.raises(JobError, match="question a: a schema with --thinking on"):
        summarize(["A text."], questions=asked[:1], thinking="on", **HERE)


def test_json_text_holds_no_infinity() -> None:
    """Of questions with different types, too, where an answer is not put into a type."""
    for as_type in (True, False):
        wrong = compile_schema({"type": "number"}).parse("1e999", as_type)
        assert isinstance(wrong, AnswerError)
        assert "beyond 64-bit floats" in wrong.reason


def test_an_answer_that_is_cut_is_an_error_that_keeps_its_text() -> None:
    for name, new in (("nested", 5), ("number", 1)):
        (row,) = summarize(["A text."], schema=SCHEMAS[name], max_new_tokens=new, **HERE).to_pylist()
        assert (row["status"], row["answer"], row["finish_reason"]) == ("error", None, None)
        assert row["output"]
        assert row["answer_error"].startswith(f"is cut off by --max-new-tokens {new}; give a larger one")
        assert row["error"] == f"the answer {row['answer_error']}"


def test_parts_of_a_document_and_their_merger_follow_the_schema() -> None:
    text = "The pump failed. Nobody noticed it. " * 120
    settings: dict[str, Any] = {"too_long": "map-reduce", "max_context": 700, "max_new_tokens": 60}
    (row,) = summarize([text], schema=SCHEMAS["list"], **settings, **HERE).to_pylist()
    assert row["parts"] > 1
    assert row["status"] == "ok", row["error"]
    assert row["answer"] == json.loads(row["output"])


def test_the_ray_data_stage_gives_typed_answers() -> None:
    stage = StemlineStage(
        schema=SCHEMAS["flat"], columns=["document_id", "answer"], engine_factory=FAKE, model=TINY_READER
    )
    kind = compile_schema(SCHEMAS["flat"]).arrow_type
    assert stage({"id": ["a", "b"], "text": ["one", "two"]}).schema.field("answer").type == kind
    assert stage({"id": [], "text": []}).schema.field("answer").type == kind
    stage.close()


def test_a_dry_run_names_the_type_and_checks_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a text")
    here = {"input": str(tmp_path / "docs"), "output": str(tmp_path / "out"), "schema": SCHEMAS["list"]}
    assert "answers: list<element: string>" in [
        line.replace("item:", "element:") for line in describe_plan(config(**here))
    ]
    monkeypatch.setattr("llguidance.hf.from_tokenizer", lambda *_, **__: 1 / 0)
    with pytest.raises(JobError, match=r"--schema: the model's tokenizer cannot be used .*it needs a tokenizer\.json"):
        list(describe_plan(config(**here)))


@pytest.mark.usefixtures("ray_here")
def test_a_job_by_a_schema_survives_a_worker_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    texts = {f"d{i:02}": f"document {i} " * (i + 1) for i in range(12)} | {"cut": "CUT", "breaker": "please RAISE " * 8}
    lines = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (docs / "docs.jsonl").write_text("\n".join(lines[:9]) + "\n")

    def job(schema: str, **more: Any) -> Any:
        settings = {"workers": 1, "device": "cpu", "flush_documents": 3, "schema": SCHEMAS[schema]} | more
        return run(config(input=str(docs), output=str(out), **settings), engine_factory=FAKE, grace=1.0)

    assert job("flat").counts == {"ok": 9}
    first = {row["document_id"]: row["answer"] for row in read_results(out).to_pylist()}
    victim = sorted(out.glob("part-*.parquet"))[1]
    victim.unlink()
    (docs / "docs.jsonl").write_text("\n".join(lines) + "\n")
    assert job("flat").counts == {"ok": 12, "error": 2}
    table = read_results(out)
    assert table.schema.field("answer").type == compile_schema(SCHEMAS["flat"]).arrow_type
    rows = {row["document_id"]: row for row in table.to_pylist()}
    assert sorted(rows) == sorted(texts)
    assert {name: rows[name]["answer"] for name in first} == first
    assert all((row["answer"] is None) == (row["status"] != "ok") for row in rows.values())
    assert "cut off" not in rows["breaker"]["error"]
    with pytest.raises(JobError, match=r"another config \(schema: "):
        job("number")
    (docs / "docs.jsonl").write_text("\n".join([*lines, json.dumps({"id": "new", "text": "new"})]) + "\n")
    assert job("number", force=True).counts["ok"] == 13
    mixed = {row["document_id"]: row["answer"] for row in read_results(out).to_pylist()}
    assert json.loads(mixed["d03"]) == first["d03"]
    assert -20 <= int(mixed["new"]) <= 1200
    assert (out / "manifest.json").stat().st_size < 20_000
