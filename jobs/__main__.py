"""What a person can run: python -m jobs prints it."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
FIRST = ("summarize", "submit", "report", "audit", "evaluate", "inspect", "demo")


def commands(folder: Path = FOLDER) -> dict[str, str]:
    """What each command of a package does, by its name; those of FIRST first. Nothing is imported."""
    files = {path.parent.name: path for path in folder.glob("*/__main__.py")}
    files |= {path.stem: path for path in folder.glob("*.py") if "run_main(main)" in path.read_text(encoding="utf-8")}
    names = sorted(files, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return {name: _about(files[name]) for name in names if name != "__main__"}


def _about(path: Path) -> str:
    """The first line of a command's docstring, or of its package's, without the command line that may follow."""
    for file in (path, path.with_name("__init__.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if not text.startswith("The command line of"):
            break
    return text.partition("\n")[0].partition(": python -m")[0].rstrip(".")


def show(folder: Path = FOLDER) -> None:
    """Print them."""
    print(f"usage: python -m {folder.name}.COMMAND [flags]; --help explains the flags of a command\n")
    for name, about in commands(folder).items():
        print(f"  {name:18}{about}")


if __name__ == "__main__":
    show()
