"""Pages: hostile text stays text, and a real browser has nothing to complain about."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from page_checks import DESKTOP, PHONE, CheckedPage
from PIL import Image

from jobs.page import (
    Chart,
    Details,
    KeyFigure,
    KeyFigures,
    Picture,
    Pictures,
    Prose,
    Section,
    SideBySide,
    Table,
    numbers,
    render_page,
)  # fmt: skip

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;<b>bold</b>${'{{ 7*7 }}'}"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63f8ffff3f0005fe02fea735818f0000000049454e44ae426082"
)


def all_blocks(text: str) -> str:
    """A page of every kind of block, `text` wherever text can stand."""
    scatter = go.Figure()
    scatter.add_scatter(
        x=[1, 2, 3], y=[1.0, None, 2.0], mode="markers", name=text, customdata=[text] * 3,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    scatter.add_scatter(x=[1, 3], y=[1, 2], mode="lines", name="line", line_color="var(--series-2)")
    scatter.update_layout(xaxis_title=text, showlegend=True)
    scatter.add_annotation(x=2, y=1.5, text=text)
    bars = go.Figure([go.Bar(x=[3.0, 1.0], y=[text, "other"], orientation="h")])
    heat = go.Figure(go.Heatmap(z=np.arange(12.0).reshape(3, 4)))
    sections = [
        Section(text, [Prose(f"{text}\n\nsecond"), KeyFigures([KeyFigure(text, text, text, "bad")] * 5)]),
        Section("Tables", [Table((text, "n"), [[text, 1234], [text * 9, None]], title=text, note=text)]),
        Section("Charts", [Chart(text, scatter, text), Chart("Bars", bars, height=200), Chart("Heat", heat)]),
        Section("Rest", [
            SideBySide([(text, text), ("b", "line 1\nline 2")], title=text), Picture(PIXEL, text, text, text),
            Pictures([Picture(PIXEL, text, text, text)] * 3, text, text, Picture(PIXEL, text)),
            Details(text, [Prose(text), Chart("Inside", heat)]),
        ]),
    ]  # fmt: skip
    return render_page(text, text, sections, text)


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_hostile_text_stays_text_in_a_browser(
    tmp_path: Path, width: int, open_page: Callable[..., CheckedPage]
) -> None:
    file = tmp_path / "page.html"
    file.write_text(all_blocks(HOSTILE), encoding="utf-8")
    seen = open_page(file, width=width)
    assert seen.text.count(HOSTILE) >= 10
    # Plotly reads markup in its texts; it, too, must show what was given: as axis title, note and category.
    assert seen.chart_text[0].count(HOSTILE) == 2
    assert HOSTILE in seen.chart_text[1]
    assert len(seen.charts) == 4


def test_text_of_strangers_starts_no_element(tmp_path: Path) -> None:
    page = all_blocks(HOSTILE)
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    assert "<script>alert" not in page
    assert page.count("</script") == page.count("<script")
    assert all_blocks("{{ 7*7 }}").count("{{ 7*7 }}") >= 10, "text is no template"


def test_a_page_lets_nothing_in_from_outside(tmp_path: Path, open_page: Callable[..., CheckedPage]) -> None:
    page = render_page("t", "s", [Section("a", [Prose("b")])])
    assert "default-src 'none'; script-src 'sha256-" in unescape(page)
    assert len(page) < 30_000, "no charts, no plotly"
    file = tmp_path / "page.html"
    for injected in ('<script>document.title = "x"</script>', '<img src="http://127.0.0.1:9/x.png">'):
        file.write_text(page.replace("<p>b</p>", injected), encoding="utf-8")
        with pytest.raises(AssertionError, match="Content Security Policy"):
            open_page(file)


def test_the_browser_test_can_fail(tmp_path: Path, open_page: Callable[..., CheckedPage]) -> None:
    file = tmp_path / "page.html"
    page = render_page("t", "s", [Section("a", [Chart("c", go.Figure(go.Scatter(x=[1], y=[1])))])])
    file.write_text(page, encoding="utf-8")
    assert open_page(file).charts == [2], "a point and a line"
    for change, complaint in {
        ("<h1>", '<h1 style="width: 2000px">'): "h1",
        ('"type":"scatter"', '"type":"scatter","visible":false'): "charts without marks",
        ('"colorway":["var(--series-1)"', '"colorway":["var(--none)"'): "no colour",
    }.items():
        assert change[0] in page
        file.write_text(page.replace(*change), encoding="utf-8")
        with pytest.raises(AssertionError, match=complaint):
            open_page(file, width=PHONE)


def test_charts_follow_light_and_dark(tmp_path: Path, open_page: Callable[..., CheckedPage]) -> None:
    file = tmp_path / "page.html"
    file.write_text(all_blocks("x"), encoding="utf-8")
    assert open_page(file).background != open_page(file, dark=True).background
    style = (Path(__file__).parents[2] / "jobs" / "page" / "style.css").read_text()
    light, dark = style.split('data-theme="dark"')[:2]
    names = set(re.findall(r"--[\w-]+(?=:)", light))
    assert len(names) > 10
    assert names == set(re.findall(r"--[\w-]+(?=:)", dark.split("\n}\n")[0])), "every colour has a dark twin"


def test_pictures_have_a_twin_for_the_night_and_wide_tables_fit_a_phone(tmp_path: Path, visit: Any) -> None:
    wide = Table(("arm", "density", "first token", "ROUGE-L"), [["dense", 1.0, "2.00 s", "0.999"]])
    blocks = [Picture(PIXEL, "a map", dark=PIXEL), wide]
    file = tmp_path / "page.html"
    file.write_text(render_page("t", "s", [Section("a", blocks)]), encoding="utf-8")
    for dark, shown in ((False, "by-day"), (True, "by-night")):
        page = visit(file, width=PHONE, dark=dark, shows="table")
        assert [box.get_attribute("class") for box in page.locator("img").all() if box.is_visible()] == [shown]
        cells = page.locator("td").all()
        assert len({box.bounding_box()["y"] for box in cells}) == 4, "each in a line of its own"
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert len({box.bounding_box()["y"] for box in visit(file, shows="table").locator("td").all()}) == 1


def test_headers_take_two_lines_before_a_table_scrolls(tmp_path: Path, visit: Any) -> None:
    """The first table of jobs.audit, which was 25 pixels too wide for 768."""
    header = ("arm", "density", "first token", "times dense", "decode step", "docs/hour", "tokens agree", "ROUGE-L")
    row = ("sampled@0.3-bf16", "0.298", "336 ms", "0.837", "9.57 ms", "9,297", "100.0%", "1.00")
    file = tmp_path / "page.html"
    file.write_text(render_page("t", "s", [Section("a", [Table(header, [row])])]), encoding="utf-8")
    for width, lines in ((768, 2), (DESKTOP, 1)):
        page = visit(file, width=width, shows="table")
        assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('.scroll'))") == 0
        heights = page.evaluate(
            """[...document.querySelectorAll("th")].map(head => {
              const range = document.createRange();
              range.selectNodeContents(head);
              return new Set([...range.getClientRects()].map(box => box.y)).size;
            })"""
        )
        assert heights == [lines if " " in name else 1 for name in header], "no word is cut, and none at its hyphen"


@pytest.mark.parametrize(("small", "width", "in_a_row"), [
    (False, PHONE, 2), (True, PHONE, 3), (False, 768, 2), (False, DESKTOP, 4), (True, DESKTOP, 8),
])  # fmt: skip
def test_small_pictures_stand_in_rows_that_fit(
    tmp_path: Path, visit: Any, small: bool, width: int, in_a_row: int
) -> None:
    file = tmp_path / "page.html"
    side = 122 if small else 242  # as jobs.inspect has them
    square = io.BytesIO()
    Image.new("RGB", (side, side)).save(square, "PNG")
    blocks = [Pictures([Picture(square.getvalue(), "a map", f"head {n}") for n in range(9)], small=small)]
    file.write_text(render_page("t", "s", [Section("a", blocks)]), encoding="utf-8")
    page = visit(file, width=width, shows=".pictures")
    boxes = [box.bounding_box() for box in page.locator(".pictures img").all()]
    assert [box["y"] for box in boxes].count(boxes[0]["y"]) == in_a_row
    assert all(box["width"] == pytest.approx(box["height"]) and box["width"] > 100 for box in boxes), "not squeezed"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_same_page_twice_is_the_same_bytes() -> None:
    assert all_blocks("x") == all_blocks("x")


def test_text_that_utf_8_cannot_hold_is_spelled_out() -> None:
    assert "\\ud800" in render_page("\ud800", "", []).encode().decode()


def test_tables_set_numbers_to_the_right_and_refuse_ragged_rows() -> None:
    table = Table(("id", "tokens", "time", "share"), [["a 1", 1234567, "3 min 05 s", 0.5], ["b", None, "850 ms", None]])
    assert [name for _, name in table.head] == ["", "number", "number", "number"]
    assert table.cells[0][1] == ("1,234,567", "number")
    assert table.cells[1][1] == ("-", "number")
    assert Table(("a",), []).head == [("a", "")]
    with pytest.raises(ValueError, match="2 columns has a row of 1"):
        Table(("a", "b"), [["x"]])


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(TypeError, match="got str"):
        render_page("t", "s", [Section("a", ["text"])])  # type: ignore[list-item]


def test_numbers_have_units() -> None:
    times = [0.0000012, 0.0123, 0.9996, 12.34, 119.9, 185.2, 3599.4, 3725]
    assert [*map(numbers.seconds, times)] == [
        "0.001 ms", "12.3 ms", "1.00 s", "12.3 s", "120 s", "3 min 05 s", "59 min 59 s", "1 h 02 min",
    ]  # fmt: skip
    assert [*map(numbers.binary_bytes, (0, 1023, 1536, 17.4 * 2**30, 5 * 2**40))] == [
        "0 B", "1023 B", "1.50 KiB", "17.4 GiB", "5.00 TiB",
    ]  # fmt: skip
    assert (numbers.share(0.2534), numbers.count(1234.0, "tokens")) == ("25.3%", "1,234 tokens")
    assert (numbers.figure(12.345, "tokens/s"), numbers.figure(0.0)) == ("12.3 tokens/s", "0.000")
    assert {f(value) for f in (numbers.seconds, numbers.share, numbers.count) for value in (None, float("nan"))} == {
        "-"
    }


def test_without_plotly_charts_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "plotly.py").write_text("raise ImportError('no plotly')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from jobs.page.charts import graph_objects\n"
        "from pipeline.errors import JobError\n"
        "try: graph_objects()\n"
        "except JobError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert "pip install" in ended.stdout


def test_chart_data_is_json_of_the_figure() -> None:
    from jobs.page.charts import chart_data

    figure = go.Figure(go.Scatter(x=[1], y=[2], name="a<b", hovertemplate="%{x}<br>"))
    data = json.loads(chart_data(figure, 100))
    assert data["data"][0]["name"] == "a&lt;b"
    assert data["data"][0]["hovertemplate"] == "%{x}<br>"
    assert data["layout"]["height"] == 100
    assert figure.layout.height is None, "the caller's figure stays as it is"
