"""Write docs/configuration.md, docs/models.md and docs/results.md: python -m tools.docs"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli import Parser, run_main
from pipeline.imports import ROOT
from tools.docs.configuration import configuration_page
from tools.docs.models import models_page
from tools.docs.results import results_page

FOLDER = ROOT / "docs"


def pages() -> dict[str, str]:
    """By file name in docs/, the page's text."""
    return {"configuration.md": configuration_page(), "models.md": models_page(), "results.md": results_page()}


def main(arguments: Sequence[str]) -> int:
    """Write the pages and say which changed; 0."""
    about = "Write the pages of settings, models and results in docs/."
    Parser(prog="python -m tools.docs", description=about, allow_abbrev=False).parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = FOLDER / name
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"docs/{name}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    run_main(main)
