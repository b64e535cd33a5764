"""The list of outputs: what a reader finds and opens, what hostile texts cannot do, and how soon it is there."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_checks import PHONE
from patience import patient
from result_rows import make_row

from jobs.page import Outputs, Section, render_page
from jobs.page.outputs import Entry, Evidence, Excerpt, Label, Pane, wide_characters
from jobs.report import documents
from jobs.report.__main__ import main
from jobs.report.changes import changes
from jobs.report.documents import Wanted, passages, read_documents
from jobs.report.outputs import answer_fields, outputs, read_rows
from jobs.report.results import load_runs
from pipeline.job import manifest
from pipeline.results.rows import result_schema, to_table
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import DocumentReader, find_files, input_hash, list_documents

HOSTILE = (
    """</script><script>document.title = "taken"</script><img src=x onerror="alert(1)">'"\u202e\u05d0 &lt;{{ 7*7 }}"""
)
FACTS = [f"Fact {number}: the tower of Norwich leans by {number} metres." for number in range(40)]
SPAN = pa.struct(
    {
        "output_start": pa.int32(), "output_end": pa.int32(), "start": pa.int64(), "end": pa.int64(),
        "score": pa.float32(),
    }
)  # fmt: skip
Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(run_command: Callable[..., tuple[int, str, str]]) -> Report:
    return partial(run_command, main)


def spans(output: str, text: str, *sentences: str) -> list[dict[str, Any]]:
    """The evidence of sentences that stand in both."""
    return [
        {
            "output_start": output.index(each), "output_end": output.index(each) + len(each),
            "start": text.index(each), "end": text.index(each) + len(each), "score": 0.9,
        }
        for each in sentences
    ]  # fmt: skip


def row(name: str, output: str | None = "out", status: str = "ok", error: str = "", **columns: Any) -> dict[str, Any]:
    """A row and its columns of newer runs."""
    newer = {key: columns.pop(key, None) for key in ("flags", "evidence", "question_id", "question", "answer", "pages")}
    measured = {"prompt_tokens": 900, "output_tokens": 9, "total_seconds": 2.5} if status == "ok" else {}
    made = make_row(name, f"docs.jsonl {name}", status, error, output=output, **(measured | columns))
    return {"row": made, **newer}


def write(folder: Path, texts: dict[str, str], rows: list[dict[str, Any]], newer: bool = True) -> Path:
    """An output folder, and the documents that it is about, in a file beside it."""
    source = folder.parent / f"{folder.name}.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    store = Store(str(folder))
    store.create()
    table = to_table([item["row"] for item in rows], result_schema())
    if newer:
        types = {"flags": pa.list_(pa.string()), "evidence": pa.list_(SPAN), "page_starts": pa.list_(pa.int64())}
        for name in ("flags", "evidence", "question_id", "question", "answer", "page_starts"):
            values = [item["pages" if name == "page_starts" else name] for item in rows]
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, pa.array(values, types.get(name, pa.string())))
    pq.write_table(table, folder / "part-000000-aaaaaaaa.parquet")
    config = JobConfig(input=(str(source),), output=str(folder), model="models/m", id_column="id")
    manifest.save(store, config, {"config": "c", "model": "m"}, state="finished", documents=len(texts))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Outputs that are fine, cut, repetitive, failed; one with evidence, behind what JavaScript counts twice."""
    text = "\U0001f600 Report.\n\n" + " ".join(FACTS)
    output = f"{FACTS[3]} \U0001f4d6 {FACTS[30]} And more."
    rows = [
        row("plain.txt", "Nothing of note happened."),
        row("evident.txt", output, evidence=spans(output, text, FACTS[3], FACTS[30]), flags=[], pages=[0, 1000]),
        row("cut.txt", "It ends in the mid", finish_reason="length", flags=["cut"]),
        row("again.txt", "again and again and again", flags=["repetitive", "strange_new"]),
        row("lost.txt", None, "oom", "it needs 93 GiB"),
        row(HOSTILE, f"{HOSTILE}\0", flags=["copied"], answer=json.dumps({HOSTILE: HOSTILE}), reasoning=HOSTILE),
    ]
    return write(tmp_path / "out", {item["row"].document_id: text for item in rows}, rows)


def names(page: Any) -> list[str]:
    return page.locator(".rows .row-head > bdi").all_inner_texts()


def after(page: Any, act: Callable[[], object]) -> list[str]:
    """The names in the list once it is drawn anew."""
    before = page.locator(".outputs").get_attribute("data-drawn")
    act()
    page.wait_for_function("before => document.querySelector('.outputs').dataset.drawn !== before", arg=before)
    return names(page)


@pytest.mark.parametrize("width", [PHONE, 768, 1280])
def test_a_reader_finds_what_needs_a_look_first(
    folder: Path, report: Report, visit: Callable[..., Any], width: int
) -> None:
    assert report(folder)[0] == 0
    page = visit(folder / "report.html", width=width, dark=width == PHONE)
    assert names(page)[:3] == ["again.txt", "cut.txt", "lost.txt"]
    counts = [" ".join(text.split()) for text in page.locator(".groups button").all_inner_texts()]
    assert counts == ["2 need a look", "1 failed", "3 look fine"]
    assert page.locator(".rows a").nth(0).locator(".badge").all_inner_texts() == ["repetitive", "strange new"]
    assert "it needs 93 GiB" in page.locator(".rows a").nth(2).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".rows a").nth(2).click()
    page.wait_for_selector("dialog[open] .error")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in ("dialog", ".reader-body"):
        assert page.locator(box).evaluate("box => box.scrollWidth <= box.clientWidth"), box


def test_search_filters_and_order(folder: Path, report: Report, visit: Callable[..., Any]) -> None:
    assert report(folder)[0] == 0
    page = visit(folder / "report.html")
    assert after(page, lambda: page.fill("input[type=search]", "leans 30")) == ["evident.txt"]
    assert page.locator(".found").inner_text() == "1 of 6 outputs"
    assert "30" in page.locator(".rows .found-word").all_inner_texts()
    assert after(page, lambda: page.fill("input[type=search]", "LOST")) == ["lost.txt"]
    assert after(page, lambda: page.fill("input[type=search]", "no such words")) == []
    assert len(after(page, lambda: page.get_by_text("Show all").click())) == 6
    assert after(page, lambda: page.select_option("[data-by=flagged]", label="cut off (1)")) == ["cut.txt"]
    assert after(page, lambda: page.select_option("[data-by=flagged]", "-1"))[0] == "again.txt"
    assert after(page, lambda: page.select_option("[data-by=status]", label="out of memory (1)")) == ["lost.txt"]
    after(page, lambda: page.select_option("[data-by=status]", "-1"))
    assert after(page, lambda: page.select_option("[data-by=order]", "name"))[-1] == "plain.txt"
    assert len(after(page, lambda: page.locator(".groups button").nth(2).click())) == 3
    assert page.locator(".groups button").nth(2).get_attribute("aria-pressed") == "true"


def test_a_sentence_leads_to_its_passage_and_back(folder: Path, report: Report, visit: Callable[..., Any]) -> None:
    assert report(folder)[0] == 0
    page = visit(folder / "report.html")
    page.locator(".rows a", has_text="evident.txt").click()
    page.wait_for_selector("dialog[open] .claim")
    claims = page.locator(".claim")
    assert [text.rstrip("12") for text in claims.all_inner_texts()] == [FACTS[3], FACTS[30]]
    assert claims.nth(1).get_attribute("title") == "page 2, score 0.90"
    marks = page.locator(".document mark")
    assert [text.lstrip("12") for text in marks.all_inner_texts()] == [FACTS[3], FACTS[30]]
    claims.nth(1).click()
    assert page.evaluate("document.activeElement.innerText") == f"2{FACTS[30]}"
    assert "chosen" in (marks.nth(1).get_attribute("class") or "")
    marks.nth(1).locator(".back").click()
    assert page.evaluate("document.activeElement.innerText").startswith(FACTS[30])


def test_outputs_without_a_passage_are_found(tmp_path: Path, report: Report, visit: Callable[..., Any]) -> None:
    rows = [
        row("invented", "It was a whale.", evidence=[], flags=["copied"]),
        row("evident", FACTS[3], evidence=spans(FACTS[3], FACTS[3], FACTS[3]), flags=[]),
        row("unasked", "Nobody looked.", evidence=None, flags=[]),
        row("empty", " ", evidence=[], flags=["empty"]),
        row("unfit", '{"cost": ', "error", "the answer is cut off", answer_error="is cut off"),
    ]
    folder = write(tmp_path / "out", {item["row"].document_id: FACTS[3] for item in rows}, rows)
    assert report(folder)[0] == 0
    page = visit(folder / "report.html")
    assert names(page) == ["empty", "unfit", "evident", "invented", "unasked"]
    assert "none that fits its schema" in page.locator(".rows .group").nth(1).inner_text()
    assert "does not say that they are right" in page.locator(".rows .group").nth(2).inner_text()
    assert after(page, lambda: page.select_option("[data-by=flagged]", label="no passage (1)")) == ["invented"]
    page.locator(".rows a").click()
    page.wait_for_selector("dialog[open] .pane")
    assert "; no passage of the document was found" in page.locator(".reader-body").inner_text()
    assert "may be right all the same" in page.locator(".reader-body").inner_text()
    copied, no_passage = (badge.bounding_box() for badge in page.locator("#reader-name .badge").all())
    assert no_passage["x"] - copied["x"] - copied["width"] > 4, "they do not stick together"
    page.keyboard.press("Escape")
    after(page, lambda: page.select_option("[data-by=flagged]", "-1"))
    page.locator(".rows a", has_text="unfit").click()
    page.wait_for_selector("dialog[open] .error")
    assert page.locator(".pane .text").first.inner_text() == '{"cost": ', "what fits no schema can be read"


def test_everything_by_keyboard(folder: Path, report: Report, visit: Callable[..., Any]) -> None:
    assert report(folder)[0] == 0
    page = visit(folder / "report.html")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    assert after(page, lambda: page.keyboard.type("again")) == ["again.txt"]
    assert len(after(page, lambda: page.keyboard.press("Escape"))) == 6
    page.wait_for_function("document.activeElement.matches('.row')")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.place") == "1"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.locator("#reader-name bdi").first.inner_text() == "cut.txt"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#reader-name bdi').innerText === 'lost.txt'")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    assert page.evaluate("document.activeElement.dataset.place") == "2"
    page.go_back() if page.evaluate("location.hash") else None
    assert page.evaluate("location.hash") == ""


def test_texts_of_strangers_stay_texts(folder: Path, report: Report, visit: Callable[..., Any]) -> None:
    assert report(folder)[0] == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 'document.title = "taken"' not in html, "texts are in no script and in no element"
    page = visit(folder / "report.html", width=PHONE)
    title = page.title()
    page.locator(".rows a", has_text="taken").click()
    page.wait_for_selector("dialog[open] .answer")
    for part in ("#reader-name bdi", ".answer dt", ".answer dd", "details .text"):
        assert page.locator(part).first.text_content() == HOSTILE, part
    assert page.locator(".pane .text").first.text_content() == f"{HOSTILE}\0"
    assert page.title() == title
    assert not page.locator("dialog img").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_light_and_dark_by_hand(folder: Path, report: Report, visit: Callable[..., Any]) -> None:
    assert report(folder)[0] == 0
    page = visit(folder / "report.html", dark=True)
    page.wait_for_load_state("load")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.locator(".theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate(colour) != dark
    page.reload(wait_until="load")
    assert page.evaluate("document.documentElement.dataset.theme") == "light", "it is remembered"


def big_list(number: int) -> Outputs:
    """A list of `number` outputs of 1,000 characters and as many excerpts, none like another."""
    groups = (Label("look", "need a look", "", "warn"), Label("fine", "look fine", "", "good"))
    texts = [f"Output {n} says key{n * 7919 % 10007}x. " + " ".join(FACTS[n % 20 : n % 20 + 16]) for n in range(number)]
    entries = [
        Entry(
            name=f"report-{n:05}.txt", group=int(n > 40), tokens=n, seconds=n / 9, document=n,
            panes=[Pane("Output", [(text, "")], evidence=[Evidence(0, 20, 0, 20, 0.5)])],
            facts=[("prompt", "9 tokens")],
        )
        for n, text in enumerate(texts)
    ]  # fmt: skip
    excerpts = [Excerpt([(0, text * 2)], 90_000) for text in texts]
    return Outputs(groups, [Label("ok", "ok")], (), (), entries, excerpts)


def test_ten_thousand_outputs_are_there_at_once(tmp_path: Path, visit: Callable[..., Any]) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_page("t", "s", [Section("Outputs", [big_list(10_000)])]), encoding="utf-8")
    page = visit(file)
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    drawn = page.evaluate("performance.getEntriesByName('outputs')[0].startTime")
    assert painted is not None
    assert painted < patient(2_000)
    assert drawn < patient(4_000)
    assert len(names(page)) == 25
    assert after(page, lambda: page.locator(".pages button").nth(1).click())[0] == "report-00025.txt"
    assert after(page, lambda: page.fill("input[type=search]", "output key3339x")) == ["report-09876.txt"]
    page.locator(".rows a").click()
    page.wait_for_selector("dialog[open] .claim")
    assert page.locator(".document .text").inner_text().startswith("1Output 9876 says")
    assert "characters are not shown" in page.locator(".document .gap").inner_text()


def test_a_page_holds_one_list() -> None:
    with pytest.raises(ValueError, match="at most one list of outputs, got 2"):
        render_page("t", "s", [Section("a", [big_list(1), big_list(1)])])


def test_rows_of_an_older_run_and_lists_that_are_too_long(
    tmp_path: Path, report: Report, visit: Callable[..., Any]
) -> None:
    rows = [row(f"d{n}", f"output {n}") for n in range(9)] + [row("cut", "half", finish_reason="length")]
    folder = write(tmp_path / "old", {item["row"].document_id: "text" for item in rows}, rows, newer=False)
    assert report(folder, "--rows", "4")[0] == 0
    page = visit(folder / "report.html")
    assert names(page) == ["cut", "d0", "d1", "d2"]
    assert "The first 4 of 10 outputs" in page.inner_text("body")
    assert report(folder, "--rows", "0")[:2] == (1, "")


def test_several_questions_to_a_document(tmp_path: Path, report: Report, visit: Callable[..., Any]) -> None:
    asked = {"costs": "What does it cost?", "risks": "Which risks are there?"}
    rows = [row(name, f"{name} {key}", question_id=key, question=text) for name in "ab" for key, text in asked.items()]
    folder = write(tmp_path / "out", dict.fromkeys("ab", "text"), rows)
    code, out, _ = report(folder, "--format", "json")
    assert (code, json.loads(out)["runs"][0]["without_row"]) == (0, 0)
    assert report(folder)[0] == 0
    page = visit(folder / "report.html")
    assert page.locator(".rows .asked").all_inner_texts() == ["costs", "risks"] * 2
    assert after(page, lambda: page.select_option("[data-by=question]", label="risks (2)")) == ["a", "b"]
    page.locator(".rows a").first.click()
    page.wait_for_selector("dialog[open]")
    assert page.locator(".question").inner_text() == asked["risks"]
    assert "4 answers about 2 documents" not in page.locator(".outputs").inner_text()
    assert "of 4 answers about 2 documents" in page.inner_text("body")


# -- two runs


def two_runs(tmp_path: Path) -> list[Path]:
    one = [
        row("worse", "all of it"), row("better", None, "timeout", "late"), row("same", "alike"),
        row("differs", "The tower leans by 3 metres."), row("gone", "only in the first"),
        row("cut", "half", flags=["cut"]),
    ]  # fmt: skip
    two = [
        row("worse", "all of", flags=["cut"]), row("better", "done"), row("same", "alike"),
        row("differs", "The tower leans by 5 metres."), row("cut", "whole", flags=[]),
    ]  # fmt: skip
    texts = dict.fromkeys(("worse", "better", "same", "differs", "gone", "cut"), "text")
    return [write(tmp_path / name, texts, rows) for name, rows in (("one", one), ("two", two))]


def test_what_changed_between_two_runs(tmp_path: Path) -> None:
    found = changes(*load_runs([str(folder) for folder in two_runs(tmp_path)]), documents="none", inputs=(), most=99)
    groups = [(entry.name, found.groups[entry.group].name) for entry in found.entries]
    assert groups[0] == ("worse", "worse")
    assert {name for name, group in groups[1:3] if group == "better"} == {"better", "cut"}
    assert groups[3:] == [("differs", "different"), ("gone", "alone"), ("same", "same")]
    parts = [pane.parts for pane in found.entries[3].panes]
    assert parts == [
        [("The tower leans by ", ""), (number, "only"), (" metres.", "")] for number in ("3", "5")
    ]  # fmt: skip
    assert found.entries[4].panes[1].note == "This run has no such row."
    assert found.note.startswith("The list has the outputs and marks of two")
    assert found.entries[0].panes[1].note.startswith("ok, the output was cut off at its greatest length"), (
        "each its own"
    )


def test_two_wordings_of_a_question_are_compared_by_document(tmp_path: Path) -> None:
    wordings = {"why": "Why did it burn?", "cause": "What was the cause?"}
    asked = [
        [row(name, f"{name}: a spark", question_id=key, question=text) for name in "ab"]
        for key, text in wordings.items()
    ]
    folders = [write(tmp_path / str(at), dict.fromkeys("ab", "text"), rows) for at, rows in enumerate(asked)]
    found = changes(*load_runs([str(folder) for folder in folders]), documents="none", inputs=(), most=99)
    assert [(entry.name, found.groups[entry.group].name) for entry in found.entries] == [("a", "same"), ("b", "same")]
    told = [pane.note.split(";")[0] for pane in found.entries[0].panes]
    assert told == [f'asked: "{text}"' for text in wordings.values()]

    more = [*asked[1], *(row(name, "other", question_id="cost", question="What did it cost?") for name in "ab")]
    several = write(tmp_path / "several", dict.fromkeys("ab", "text"), more)
    found = changes(*load_runs([str(folders[0]), str(several)]), documents="none", inputs=(), most=99)
    assert {found.groups[entry.group].name for entry in found.entries} == {"alone"}, (
        "nobody knows which belong together"
    )


def test_two_runs_in_a_browser(tmp_path: Path, report: Report, visit: Callable[..., Any]) -> None:
    one, two = two_runs(tmp_path)
    assert report(one, two)[0] == 0
    page = visit(one / "comparison.html", width=PHONE)
    assert names(page)[0] == "worse"
    page.locator(".rows a", has_text="differs").click()
    page.wait_for_selector("dialog[open] ins.only")
    assert page.locator("ins.only").all_inner_texts() == ["3", "5"]
    assert page.locator(".pane h3").all_inner_texts() == ["one", "two", "Document"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_two_outputs_beside_their_document(tmp_path: Path, report: Report, visit: Callable[..., Any]) -> None:
    text = "\U0001f600 " + " ".join(FACTS)
    said = [f"In short: {FACTS[3]}", f"{FACTS[3]} {FACTS[30]}"]
    one, two = (
        [row("told.txt", output, evidence=spans(output, text, *facts)), *more]
        for output, facts, more in ((said[0], FACTS[3:4], [row("gone.txt")]), (said[1], (FACTS[3], FACTS[30]), []))
    )
    folders = [
        write(tmp_path / name, dict.fromkeys(names, text), rows)
        for name, names, rows in (("one", ("told.txt", "gone.txt"), one), ("two", ("told.txt",), two))
    ]
    assert report(*folders)[::2] == (0, "")
    page = visit(folders[0] / "comparison.html")
    page.locator(".rows a", has_text="told.txt").click()
    page.wait_for_selector("dialog[open] .claim")
    assert page.locator(".pane h3").all_inner_texts() == ["one", "two", "Document"]
    claims, marks = page.locator(".claim"), page.locator(".document mark")
    assert claims.all_inner_texts() == [f"{FACTS[3]}1", f"{FACTS[3]}2", f"{FACTS[30]}3"]
    assert page.locator("ins.only").all_inner_texts()[:2] == ["In", "short"], "what differs is marked, too"
    claims.nth(2).click()
    assert page.evaluate("document.activeElement.innerText") == f"3{FACTS[30]}"
    marks.nth(0).get_by_text("1", exact=True).click()
    assert page.evaluate("document.activeElement.closest('.pane').querySelector('h3').innerText") == "one"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#reader-name').innerText.startsWith('gone')")
    assert FACTS[0] in page.locator(".document").inner_text(), "read where the first run found it"


@pytest.mark.parametrize("width", [PHONE, 768, 1280])
def test_both_outputs_and_their_document_fit(
    width: int, tmp_path: Path, report: Report, visit: Callable[..., Any]
) -> None:
    text = " ".join(FACTS)
    folders = [
        write(tmp_path / name, {"long.txt": text * 9}, [row("long.txt", f"{name} {text}")]) for name in ("one", "two")
    ]
    assert report(*folders)[0] == 0
    page = visit(folders[0] / "comparison.html", width=width)
    page.locator(".rows a", has_text="long.txt").click()
    page.wait_for_selector("dialog[open] .document")
    boxes = [page.locator(".pane").nth(at).bounding_box() for at in range(3)]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 150 for box in boxes)
    apart = all(
        one["x"] + one["width"] <= other["x"] or one["y"] + one["height"] <= other["y"]
        for at, one in enumerate(boxes) for other in boxes[at + 1 :]
    )  # fmt: skip
    assert apart, boxes


def test_passages_of_another_text_are_not_marked_in_this_one(tmp_path: Path) -> None:
    """Neither those of a run that read another text, nor any once the document has changed."""
    texts = {"a": f"New words. {FACTS[3]}"}
    rows = [
        [row("a", FACTS[3], evidence=spans(FACTS[3], text, FACTS[3]), input_hash=made_from, input_stamp="old")]
        for text, made_from in ((FACTS[3], "0" * 16), (texts["a"], "1" * 16))
    ]
    folders = [str(write(tmp_path / str(at), texts, each)) for at, each in enumerate(rows)]
    runs = load_runs(folders)
    (single,) = outputs(runs[1], documents="full", inputs=(), most=9).entries
    assert "without evidence" in single.document_note
    assert single.panes[0].evidence is None

    pair = changes(*runs, documents="none", inputs=(), most=9).entries[0]
    assert [pane.evidence is not None for pane in pair.panes] == [False, True]
    assert "The first run read another text of it" in pair.document_note


# -- documents and what is packed


def test_documents_that_changed_or_went_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = load_runs([str(folder)])
    wanted = [Wanted(name, "another stamp", "0" * 16, [(0, 5)]) for name in ("cut.txt", "nowhere.txt")]
    changed, gone = read_documents(run, wanted, how="passages")
    assert "has changed" in changed.note
    assert changed.excerpt is not None
    assert gone.excerpt is None
    assert "no longer" in gone.note
    ticks = iter(range(0, 10_000, 1000))
    (late, _) = read_documents(run, wanted, how="passages", clock=lambda: float(next(ticks)))
    assert "--documents full" in late.note
    assert read_documents(run, wanted, how="full", clock=lambda: 1e9)[0].excerpt is not None
    assert read_documents(run, wanted, how="none")[0] == documents.Found(None)
    (folder.parent / "out.jsonl").unlink()
    (missing, _) = read_documents(run, wanted, how="passages")
    assert "give --input" in missing.note


def test_columns_in_prompts_are_of_the_document(tmp_path: Path) -> None:
    """They are of its hash: without them a document that was only copied would count as changed."""
    source = tmp_path / "docs.jsonl"
    source.write_text(json.dumps({"id": "a", "text": "Some text.", "year": 1999, "ask": ["Why?"]}) + "\n")
    template = "{{ year }} {{ document }} {{ question }}"
    config = JobConfig(input=str(source), output=str(tmp_path / "out"), model="m", questions_column="ask")
    columns = {"year": "--prompt-file", "ask": "--questions-column"}
    catalogue = list_documents(find_files([str(source)])[0], prompt_columns=columns)
    made_from = input_hash(*DocumentReader("text", [], config, tuple(columns)).read(catalogue.document(0)))
    store = Store(config.output)
    store.create()
    manifest.save(store, config, {"config": "c"}, state="finished", documents=1, prompt={"template": template})
    (run,) = load_runs([config.output])
    (same,) = read_documents(run, [Wanted("a", "another stamp", made_from, [])], how="full")
    assert same.note == ""
    source.write_text(source.read_text().replace("1999", "2000"))
    (changed,) = read_documents(run, [Wanted("a", "another stamp", made_from, [])], how="full")
    assert "has changed" in changed.note


def test_documents_are_read_in_the_encoding_of_their_job(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes("A caf\xe9.".encode("cp1252"))
    config = JobConfig(input=str(source), output=str(tmp_path / "out"), model="m", encoding="cp1252")
    document = list_documents(find_files([str(source)])[0], settings=config).document(0)
    made_from = input_hash(*DocumentReader("text", [], config).read(document))
    store = Store(config.output)
    store.create()
    manifest.save(store, config, {"config": "c"}, state="finished", documents=1)
    (run,) = load_runs([config.output])
    (found,) = read_documents(run, [Wanted(document.document_id, document.stamp, made_from, [])], how="full")
    assert found.note == ""
    assert found.excerpt is not None
    assert found.excerpt.passages == [(0, "A caf\xe9.")]


def test_documents_that_were_moved_are_found(folder: Path, report: Report, visit: Callable[..., Any]) -> None:
    moved = (folder.parent / "out.jsonl").rename(folder.parent / "moved.jsonl")
    _, _, told = report(folder)
    assert "the page shows outputs without their documents, 5 of them; " in told, "who makes the page can mend it"
    assert "give --input" in told
    assert report(folder, "--input", moved)[::2] == (0, "")
    page = visit(folder / "report.html")
    page.locator(".rows a", has_text="evident.txt").click()
    page.wait_for_selector("dialog[open] .document mark")


def test_passages_hold_their_spans_and_little_else() -> None:
    text = " ".join(f"word{number}" for number in range(100_000))
    wanted = [(1000, 1100), (1300, 1400), (500_000, 500_100), (10**9, 10**9 + 5)]
    found = passages(text, wanted, 4000)
    assert len(found) == 2
    for start, piece in found:
        assert text[start : start + len(piece)] == piece
        assert piece.startswith("word")
    for first, last in wanted[:3]:
        assert any(start <= first and last <= start + len(piece) for start, piece in found)
    assert sum(len(piece) for _, piece in found) < 8000
    assert passages(text, [], 500)[0][0] == 0
    assert sum(len(piece) for _, piece in passages(text, [(0, len(text))], 2000)) < 10_000
    many = passages(text, [(at, at + 10) for at in range(0, len(text), 900)], 2000)
    assert sum(len(piece) for _, piece in many) <= 8000


def test_offsets_are_those_of_javascript() -> None:
    assert wide_characters("a\U0001f600b\U0001f600").tolist() == [1, 3]
    entry = Entry("n", 0, [Pane("o", [("\U0001f600ab", "")], evidence=[Evidence(1, 3, 2, 4, None)])], document=0)
    excerpt = Excerpt([(0, "x\U0001f600\U0001f600y")], 4, wide_characters("x\U0001f600\U0001f600y"))
    blocks = dict(Outputs([Label("g", "g")], [Label("ok", "ok")], (), (), [entry], [excerpt]).blocks)
    (packed_row,) = json.loads(zlib.decompress(base64.b64decode(blocks["rows-0"]), -15))
    assert packed_row["panes"][0]["evidence"] == [[2, 4, 3, 6, None]]
    (packed_document,) = json.loads(zlib.decompress(base64.b64decode(blocks["documents-0"]), -15))
    assert packed_document["length"] == 6


def test_answers_field_by_field() -> None:
    assert answer_fields({"a": 1, "b": ["x", "y"], "c": None, "d": {"e": True}}) == [
        ("a", "1"), ("b", "x\ny"), ("c", "-"), ("d", '{\n "e": true\n}'),
    ]  # fmt: skip
    assert answer_fields('{"a": "b"}') == [("a", "b")]
    assert answer_fields("no JSON") == [("answer", "no JSON")]
    assert answer_fields(None) == answer_fields("") == []


def test_what_is_marked_and_what_is_harmless(folder: Path) -> None:
    (run,) = load_runs([str(folder)])
    groups = {item.document_id: (item.group, item.flags) for item in read_rows(run)}
    assert groups["cut.txt"] == (0, ("cut",))
    assert groups["lost.txt"][0] == 1
    assert groups[HOSTILE] == (2, ("copied",))
