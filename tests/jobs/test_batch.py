"""OpenAI's batch files: which requests are answered, what a job reads of them, and the output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobs.summarize
from jobs.batch import grouping
from jobs.batch.__main__ import PROMPT, main
from jobs.batch.files import documents_of
from jobs.batch.grouping import LEAST_SHARED, group
from jobs.batch.requests import read_requests, settings_of
from pipeline import read_results
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import Task
from pipeline.prompts.tokens import load_tokens

ROOT = Path(__file__).parents[2]
REPORT = (ROOT / "examples/documents/report-01.txt").read_text(encoding="utf-8")[:1800].rstrip()
FOUND = f"{REPORT}\n\nKey finding: The mill lost 14 pallets to damp in June.\n\n"
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]]) -> Run:
    """Runs the command in this process: (exit code, standard output, standard error)."""
    return partial(run_command, main)


def asking(custom_id: str, content: Any, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {
        "custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }  # fmt: skip


def batch(folder: Path, requests: Sequence[Any]) -> Path:
    path = folder / "batch.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in requests]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# -- what a job reads


def whole(one: grouping.Group, question: str) -> str:
    return one.document + one.space + question


WORDS = st.lists(st.sampled_from(["a", "Wo", "x.", " ", "  ", "\n", "\n\n", "\t", "中", "é"]), min_size=1, max_size=12)
MESSAGES = st.lists(
    st.builds(lambda head, words: ("", "long " * 30, "long " * 30 + "more\n\n" * 20)[head] + "".join(words),
              st.integers(0, 2), WORDS).map(str.rstrip).filter(lambda text: len(text.strip()) > 1),
    max_size=12,
)  # fmt: skip


@settings(deadline=None)
@given(messages=MESSAGES)
def test_groups_are_the_messages_and_share_enough(messages: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "LEAST_SHARED", 100)
        groups = group(messages)
    assert sorted(number for one in groups for number in one.members) == list(range(len(messages)))
    for one in groups:
        assert one.document.strip()
        assert not one.space.strip()
        assert "\n" not in one.space
        assert [whole(one, question) for question in one.questions] == [messages[number] for number in one.members]
        assert all(question and question == question.strip() for question in one.questions)
        if len(one.members) > 1:
            assert len(one.document) >= 100
            assert all(2 * len(one.document) >= len(messages[number]) for number in one.members)


def test_who_shares_with_whom() -> None:
    mill, dam = "The mill lost pallets. " * 100, "The dam leaked. " * 150
    head = "Read the report and answer with care. " * 30
    asked = [head + mill + "Who?", head + dam + "Who?", head + mill + "When?", head + dam + "What for?", "Who are you?"]
    groups = group(asked)
    assert sorted(tuple(sorted(one.members)) for one in groups) == [(0, 2), (1, 3), (4,)], "not by what all begin with"
    assert {one.document for one in groups if len(one.members) == 2} == {(head + text).rstrip() for text in (mill, dam)}
    assert [len(one.members) for one in group([mill + "Who?"] * 3)] == [3], "the same message again"
    short = "x " * (LEAST_SHARED // 2 - 10)
    assert len(group([short + "Who?", short + "When?"])) == 2
    long = [mill + f"Here is another text: {text * 900} Who?" for text in ("abc ", "xyz ")]
    assert len(group(long)) == 2, "what is long is no question"
    assert len(group([mill + f"Who is {number}?" for number in range(1001)])) == 2, "a document has 1,000 questions"


@pytest.mark.parametrize(
    ("message", "document", "question"),
    [
        ("A text of some length.\nIts second line.\n\nWho?", "A text of some length.\nIts second line.\n\n", "Who?"),
        ("A long text of some length.\r\n  Who?", "A long text of some length.\r\n", "Who?"),
        ("What is the capital of France?", "What is the capital of", "France?"),
        ("Summarize:\nA line that is much longer than what it is to be read for.",
         "Summarize:\nA line that is much longer than what it is to be read", "for."),
        ("Hello!", "Hello", "!"),
        ("  ab", "  a", "b"),
        ("请总结以下内容。", "请总结以下内容", "。"),
    ],
)  # fmt: skip
def test_a_message_by_itself_is_parted_near_its_end(message: str, document: str, question: str) -> None:
    (one,) = group([message])
    assert (one.document, one.questions) == (document, (question,))
    assert whole(one, question) == message


def test_the_prompt_is_the_message(model: Path) -> None:
    """The ids of the parted message are those of the whole one, wherever it is parted at white space."""
    tokens = load_tokens(str(model))
    template = PROMPT.read_text(encoding="utf-8").rstrip("\n")
    messages = [
        FOUND + "List the key findings in order.",
        FOUND + "Who?",
        "What is the capital of France?",
        "One.\n \nTwo",
    ]
    for one in group(messages):
        for number, question in zip(one.members, one.questions, strict=True):
            parted = PromptBuilder(tokens, Task(question, template, question, own=True))
            plain = PromptBuilder(tokens, Task("", "{{ document }}", ""))
            built = parted.build(one.document, 10_000, columns={"space": one.space}).ids
            assert messages[number] in tokens.tokenizer.decode(built)
            assert np.array_equal(built, plain.build(messages[number], 10_000).ids), messages[number]


# -- which requests there are


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: expected a JSON object with custom_id, method, url and body, got 'nonsense'"),
        ([1], r"line 2: expected a JSON object .*got \[1\]"),
        ({"id": "a", "text": "b"}, "line 2: expected a text as its custom_id, got None"),
        ({"custom_id": "b"}, "line 2: expected a JSON object as its body, got None"),
        (asking("b", "") | {"body": {"prompt": "x"}}, "line 2: expected a list as its body.messages, got None"),
        (asking("a", "Another one"), "line 2: its custom_id 'a' is that of line 1"),
        (asking("b", "A question", model="other"), r"line 1 \('a'\) and line 2 \('b'\) differ in their model, 'm' and"),
        (asking("b", "A question", stop="END"), "differ in stop, .*split the file"),
        (asking("b", "A question", response_format=FORM),
         "differ in the schema of response_format"),
        (asking("b", "", messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?"}]),
         "differ in the system message, None and 'Be brief.'; a job has one for all: split the file"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_batch_is_refused(line: Any, message: str, run: Run, tmp_path: Path) -> None:
    path = batch(tmp_path, [asking("a", "A question"), line])
    code, out, err = run("--input", path, "--output", tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: --input {path}: line ")
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "/v1/embeddings", "body": {"input": "x"}}, "only POST /v1/chat/completions is answered here"),
        ({"method": "GET"}, "only POST"),
        ({"n": 2}, "body.n 2: each question to a document has one output"),
        ({"tools": [{"type": "function"}]}, "body.tools .* is not possible here"),
        ({"logprobs": True}, "body.logprobs True: probabilities are not given out"),
        ({"stream": True}, "body.stream True is not possible here"),
        ({"frequency_penalty": 0.5}, "body.frequency_penalty 0.5: --repetition-penalty is the only penalty"),
        ({"warmth": 3}, "body.warmth 3: there is no such setting here"),
        ({"top_p": 0}, "body: top_p must be above 0 and at most 1, got 0"),
        ({"max_tokens": 0}, "body: max_new_tokens must be a whole number of at least 1, got 0"),
        ({"stop": 3}, "body.stop must be a text or a list of texts, got 3"),
        ({"response_format": {"type": "json_object"}}, "body.response_format must be text, or json_schema"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "got user, as"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only texts .* got 'image_url'"),
        ({"messages": [{"role": "user", "content": " ?\n"}]}, "two characters or more"),
        ({"messages": [{"role": "user", "content": "\ud800 a"}]}, "the content must be a text"),
        ({"messages": ["user"]}, "no conversations, got None"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_refused_by_itself(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bad = asking("bad", "A question")
    outer = {key: value for key, value in changes.items() if key in bad}
    bad = bad | outer if outer else bad | {"body": bad["body"] | changes}
    one, refused, other = read_requests(str(batch(tmp_path, [asking("a", "A question"), bad, asking("b", "Hm, why?")])))
    assert (one.refused, other.refused) == ("", "")
    assert re.search(message, refused.refused), refused.refused


def test_what_changes_nothing_is_let_in(tmp_path: Path) -> None:
    harmless = {
        "n": 1,
        "stream": False,
        "frequency_penalty": 0.0,
        "user": "me",
        "logprobs": None,
        "top_k": -1,
        "seed": 3,
    }
    both = {"response_format": FORM, "stop": ["END"], "chat_template_kwargs": {"enable_thinking": False}}
    parts = [{"type": "text", "text": "Two"}, {"type": "text", "text": "lines \n"}]
    lines = ["", asking("a", parts, max_completion_tokens=7, **harmless, **both), asking("b", "Hm?", seed=3, **both)]
    one, other = read_requests(str(batch(tmp_path, lines)))
    assert (one.message, one.line, one.own) == ("Two\nlines", 2, {"seed": 3, "max_new_tokens": 7})
    assert settings_of([one, other], "x") == {
        "seed": 3, "stop": ["END"], "schema": {"type": "object"}, "chat_template_args": {"enable_thinking": False}
    }  # fmt: skip


# -- the whole way


def output(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batch_output.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("ray_here")
def test_a_batch_is_answered_and_resumed(run: Run, tmp_path: Path, model: Path) -> None:
    asked = "List the key findings in order."
    requests = [
        asking("second", FOUND + asked + "\n", max_tokens=40),
        asking("none", "Hello there", n=2),
        asking("cut", FOUND + "List the key findings.", max_tokens=5, temperature=0),
        asking("alone", f"Notes.\n\nKey finding: It rained on Monday in Ashford.\n\n{asked}", model="m"),
        asking("binary", "%PDF-1.4 is what it begins with"),
    ]
    out = tmp_path / "out"
    line = ("--input", batch(tmp_path, requests), "--output", out, "--model", model, "--max-new-tokens", 30)
    code, told, err = run(*line)
    assert code == 2, err
    assert "3 of 5 requests are answered" in told
    assert "failed: none: body.n 2" in told
    found = {line["custom_id"]: line for line in output(out)}
    assert list(found) == ["second", "none", "cut", "alone", "binary"]
    assert len({line["id"] for line in found.values()}) == 5
    assert found["none"]["response"] is None
    assert found["none"]["error"]["code"] == "invalid_request"
    assert found["binary"]["error"] == {"code": "error", "message": found["binary"]["error"]["message"]}
    assert "PDF" in found["binary"]["error"]["message"]
    bodies = {name: found[name]["response"]["body"] for name in ("second", "cut", "alone")}
    second = bodies["second"]["choices"][0]
    assert second["message"] == {"role": "assistant", "content": "1. The mill lost 14 pallets to damp in June."}
    assert (second["finish_reason"], bodies["second"]["object"]) == ("stop", "chat.completion")
    assert bodies["second"]["model"] == str(model)
    assert (bodies["cut"]["usage"]["completion_tokens"], bodies["cut"]["choices"][0]["finish_reason"]) == (5, "length")
    for body in bodies.values():
        usage = body["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    rows = read_results(out).to_pylist()
    shared = [row for row in rows if row["document_id"] in ("second", "cut")]
    assert len(shared) == 2
    assert sorted(row["prefix_tokens"] > 0 for row in shared) == [False, True], "their beginning is read once"

    before = (out / "batch_output.jsonl").read_bytes(), (out / "batch/documents.parquet").stat().st_mtime_ns
    (out / "batch_output.jsonl").unlink()
    code, told, _ = run(*line)
    assert (code, "nothing to do" in told) == (2, True)
    assert ((out / "batch_output.jsonl").read_bytes(), (out / "batch/documents.parquet").stat().st_mtime_ns) == before

    code, _, err = run(*line[:1], batch(tmp_path, requests[:3]), *line[2:])
    assert (code, "rows are of documents that the input does not hold" in err) == (1, True), "another batch"


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What an output holds, and when it was written; but for the lock, which a job takes before it looks."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


REFUSED = asking("a", "A question", n=2)
TOLD = "refused: a: body.n 2: each question to a document has one output\n"
DAM = "\n".join(f"In week {number} the dam leaked at gate {number % 7}, and nobody came." for number in range(40))


def test_a_batch_of_which_nothing_can_be_answered_starts_no_job(run: Run, tmp_path: Path) -> None:
    line = ("--input", batch(tmp_path, [REFUSED]), "--output", tmp_path / "out")
    code, told, err = run(*line, "--dry-run")
    assert (code, told, err) == (2, TOLD + "requests: 0 of 1 can be answered\n", "")
    assert not (tmp_path / "out").exists()
    code, _, _ = run(*line)
    assert (code, [line["error"]["code"] for line in output(tmp_path / "out")]) == (2, ["invalid_request"])


@pytest.mark.usefixtures("ray_here")
def test_a_refused_run_changes_nothing(
    run: Run, run_command: Callable[..., tuple[int, str, str]], tmp_path: Path, model: Path
) -> None:
    path, mine, other = tmp_path / "batch.jsonl", tmp_path / "mine", tmp_path / "other"
    flags = ("--model", model, "--max-new-tokens", 5)
    batch(tmp_path, [asking("a", f"{FOUND}Who?")])
    assert run("--input", path, "--output", mine, *flags)[0] == 0
    (tmp_path / "text.txt").write_text(FOUND, encoding="utf-8")
    assert run_command(jobs.summarize.main, "--input", tmp_path / "text.txt", "--output", other, *flags)[0] == 0
    before = files(mine), files(other)
    assert {"batch/documents.parquet", "batch_output.jsonl"} <= before[0].keys()

    for requests in ([asking("a", f"{DAM}\n\nWho?")], [REFUSED]):
        batch(tmp_path, requests)
        for more in ((), ("--dry-run",)):
            code, _, err = run("--input", path, "--output", other, *flags, *more)
            assert (code, err.startswith(f"error: --output {other}: it ")) == (1, True), err
            code, _, err = run("--input", path, "--output", mine, *flags, "--max-new-tokens", 6, *more)
            assert (code, err.startswith(f"error: --output {mine}: it ")) == (1, True), err
            assert (files(mine), files(other)) == before

    batch(tmp_path, [asking("a", f"{DAM}\n\nWho?")])
    assert run("--input", path, "--output", tmp_path / "new", "--model", tmp_path / "nowhere")[0] == 1
    assert not (tmp_path / "new").exists()

    batch(tmp_path, [REFUSED])
    assert run("--input", path, "--output", mine, *flags, "--force")[0] == 2
    assert [line["error"]["code"] for line in output(mine)] == ["invalid_request"]
    assert len(read_results(mine)) == 1


# Requests of a batch, and how many tokens each is answered with, to know the answers by.
FIRST = {"m": f"{FOUND}Many or few?", "z": f"{FOUND}Zinc or tin?", "dam": f"{DAM}\n\nWho?", "dim": f"{DAM}\n\nWhy?"}
MOST = {name: number for number, name in enumerate((*FIRST, "a", "new"), 2)}


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    "changes",
    [
        {"a": f"{FOUND}And who?"},
        {"m": f"{FOUND}Zinc or zinc?"},
        {"dam": f"{FOUND}Who?"},
        {"m": f"{DAM}\n\nMany?"},
        {"dam": f"{FOUND}A?", "dim": f"{FOUND}Zzz?", "a": f"{FOUND}And who?", "new": "Something else."},
    ],
    ids=["added in front", "first reworded", "two become one", "first goes over", "much at once"],
)
def test_requests_are_added_and_reworded(changes: dict[str, str], run: Run, tmp_path: Path, model: Path) -> None:
    def answer(requests: dict[str, str]) -> str:
        asked = [asking(name, text, max_tokens=MOST[name]) for name, text in requests.items()]
        code, told, err = run("--input", batch(tmp_path, asked), "--output", tmp_path / "out", "--model", model)
        assert code == 0, err
        lines = {line["custom_id"]: line["response"]["body"] for line in output(tmp_path / "out")}
        tokens = {name: body["usage"]["completion_tokens"] for name, body in lines.items()}
        assert tokens == {name: MOST[name] for name in requests}, "each has its own answer"
        return told

    answer(FIRST)
    answer(FIRST | changes)
    rows = read_results(tmp_path / "out")
    assert len(rows) == len(FIRST | changes)
    assert "nothing to do" in answer(FIRST | changes)


@pytest.mark.usefixtures("ray_here")
def test_a_damaged_part_is_set_aside_and_told(run: Run, tmp_path: Path, model: Path) -> None:
    line = ("--input", batch(tmp_path, [asking("a", f"{FOUND}Who?")]), "--output", tmp_path / "out", "--model", model)
    assert run(*line)[0] == 0
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    code, _, err = run(*line)
    assert (code, f"{part.name} is damaged" in err) == (0, True), err
    assert output(tmp_path / "out")[0]["response"]


def test_documents_keep_their_ids(tmp_path: Path) -> None:
    path = batch(tmp_path, [asking(name, f"{FOUND}{name}, who?") for name in ("a", "b", "c", "d")])
    requests = read_requests(str(path))
    for named, documents in (((), {"a": "abcd"}), (("c", "gone"), {"c": "abcd"}), (("b", "d"), {"b": "abc", "d": "d"})):
        table, places = documents_of(requests, (), named)
        assert table["id"].to_pylist() == list(documents)
        assert len(set(table["text"].to_pylist())) == 1
        assert places == {
            request: (document, f"own-{number}")
            for document, members in documents.items()
            for number, request in enumerate(members, 1)
        }


def test_flags_that_speak_of_documents_are_not_there(run: Run, tmp_path: Path) -> None:
    path = batch(tmp_path, [asking("a", "A question")])
    assert "--question is a flag of jobs.summarize" in run("--input", path, "--output", "out", "--question", "Who?")[2]
    (tmp_path / "job.yaml").write_text("shard: 0/2\n")
    assert "shard has no meaning for a batch" in run("--config", tmp_path / "job.yaml", "--input", path)[2]
    assert "--input is missing" in run("--output", "out")[2]
    assert "--output is missing" in run("--input", path)[2]
    code, _, err = run("--input", tmp_path / "nowhere.jsonl", "--output", "out")
    assert (code, "cannot be read" in err) == (1, True)


def test_a_dry_run_tells_the_plan_and_leaves_nothing(run: Run, tmp_path: Path, model: Path) -> None:
    schema = {"type": "object", "properties": {"town": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    asked = asking("b", f"{FOUND}Where is it?", response_format=form, max_tokens=7)
    for requests, expected in (([asked], 0), ([asked, REFUSED], 2)):
        path = batch(tmp_path, requests)
        code, told, err = run("--input", path, "--output", tmp_path / "out", "--model", model, "--dry-run")
        assert (code, err) == (expected, "")
        assert "town" in told, "the answers' type"
        assert f"requests: 1 of {len(requests)} can be answered\n" in told
        assert (TOLD in told) == (REFUSED in requests)
        assert not (tmp_path / "out").exists()
