"""A real browser for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from page_checks import CheckedPage, check_page
from patience import patient

from jobs.cli import run_main

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Command:
    """run_command(main, *arguments): runs a command in this process: (exit code, standard output, standard error)."""

    def call(main: Callable[[Sequence[str]], int], *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_main(main, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


# Not for the session: while playwright runs, its event loop keeps asyncio.run out of this process's other tests.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium, as playwright drives it.

    Where it is not installed, tests that ask for this are skipped; in continuous integration they fail.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Callable[..., CheckedPage]:
    """open_page(file, width=390, dark=False, screenshot=None) -> CheckedPage: a page in Chromium, looked over."""

    def call(file: Path, *, width: int = 1280, dark: bool = False, screenshot: Path | None = None) -> CheckedPage:
        return check_page(chromium, file, width=width, dark=dark, screenshot=screenshot)

    return call


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """visit(file, width=1280, dark=False) -> a page of playwright, to be used as a reader does, once it `shows` that.

    At the end of the test it must have logged nothing and asked the network for nothing.
    """
    contexts, told = [], []

    def call(file: Path, *, width: int = 1280, dark: bool = False, shows: str = ".outputs[data-drawn]") -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 844 if width < 600 else 900},
            color_scheme="dark" if dark else "light", has_touch=width < 600,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(patient(30_000))
        page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: (told.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked_for(request.url, file, told))
        page.goto(file.resolve().as_uri(), wait_until="commit")
        page.wait_for_selector(shows, state="attached")
        return page

    yield call
    for context in contexts:
        context.close()
    assert not told


def asked_for(url: str, file: Path, told: list[str]) -> None:
    """Note a request for anything but the page itself."""
    if not url.startswith(("data:", "blob:")) and url.partition("#")[0] != file.resolve().as_uri():
        told.append(f"request: {url}")
