"""A real browser for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from page_checks import CheckedPage, check_page

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
def open_page() -> Iterator[Callable[..., CheckedPage]]:
    """open_page(file, width=390, dark=False, screenshot=None) -> CheckedPage: a page in headless Chromium.

    Where Chromium is not installed, tests that ask for this are skipped; in continuous integration they fail.
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

        def call(file: Path, *, width: int = 1280, dark: bool = False, screenshot: Path | None = None) -> CheckedPage:
            return check_page(browser, file, width=width, dark=dark, screenshot=screenshot)

        yield call
        browser.close()
