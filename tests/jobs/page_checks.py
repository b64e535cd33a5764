"""What must be true of a page in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patience import patient

PHONE, DESKTOP = 390, 1280

# Elements that reach beyond the window although nothing around them scrolls or cuts them.
_WIDE = """() => {
  const clipped = (element) => {
    for (let at = element.parentElement; at && at !== document.body; at = at.parentElement)
      if (getComputedStyle(at).overflowX !== "visible") return true;
    return false;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !clipped(e))
    .slice(0, 5).map((e) => e.outerHTML.slice(0, 120));
}"""
# Marks that plotly drew: points, lines, bars, boxes and the image of a heat map.
_MARKS = ", ".join(
    f".cartesianlayer {mark}" for mark in ("path.point", "path.js-line", ".points path", "path.box", ".hm image")
)


@dataclass(frozen=True)
class CheckedPage:
    """What a browser saw. charts: marks drawn in each chart. background: colour of the page as CSS gives it."""

    text: str
    charts: list[int]
    background: str
    chart_text: list[str]


def check_page(browser: Any, file: Path, *, width: int, dark: bool, screenshot: Path | None) -> CheckedPage:
    """Open a page and see to it that it loads nothing else, logs nothing, fits the width and draws all its charts."""
    context = browser.new_context(
        viewport={"width": width, "height": 844 if width < 600 else 900},
        color_scheme="dark" if dark else "light",
        has_touch=width < 600,
    )
    from playwright.sync_api import TimeoutError

    try:
        page = context.new_page()
        told: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: (told.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.resolve().as_uri(), wait_until="load")
        count = page.locator(".chart").count()
        if count:
            try:
                page.wait_for_selector("html[data-charts=drawn]", state="attached", timeout=patient(30_000))
            except TimeoutError:
                told.append("the charts were not drawn in 30 s")
        if screenshot:
            page.screenshot(path=str(screenshot), full_page=True)
        seen = CheckedPage(
            text=page.inner_text("body"),
            charts=[page.locator(".chart").nth(at).locator(_MARKS).count() for at in range(count)],
            background=page.evaluate("getComputedStyle(document.body).backgroundColor"),
            chart_text=[box.text_content() or "" for box in page.locator(".chart").all()],
        )
        assert not told, f"the browser's console at {width} pixels: {told}"
        assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.resolve().as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page.evaluate(_WIDE)
        assert not page.evaluate(_WIDE)
        assert all(seen.charts), f"charts without marks at {width} pixels: {seen.charts}"
        return seen
    finally:
        context.close()
