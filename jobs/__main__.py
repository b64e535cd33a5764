"""What a person can run: python -m jobs prints it."""

from __future__ import annotations

import ast
from pathlib import Path

FIRST = ("summarize", "submit", "report", "audit", "inspect", "demo")  # the others are for those who work on this


def commands() -> dict[str, str]:
    """What each command does, by its name; those of users first. Nothing is imported."""
    folder = Path(__file__).parent
    files = {path.parent.name: path for path in folder.glob("*/__main__.py")}
    files |= {path.stem: path for path in folder.glob("*.py") if "run_main(main)" in path.read_text(encoding="utf-8")}
    names = sorted(files, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return {name: _about(files[name]) for name in names if name != Path(__file__).stem}


def _about(path: Path) -> str:
    """The first line of a command's docstring, or of its package's, without the command line that may follow."""
    for file in (path, path.with_name("__init__.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if not text.startswith("The command line of"):
            break
    return text.partition("\n")[0].partition(": python -m")[0].rstrip(".")


def show() -> None:
    """Print them."""
    print("usage: python -m jobs.COMMAND [flags]; --help explains the flags of a command\n")
    for name, about in commands().items():
        print(f"  {name:18}{about}")


if __name__ == "__main__":
    show()
