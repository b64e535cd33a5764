"""The command stemline, and python -m jobs, which does the same: stemline COMMAND [flags]

A command is imported only when it runs.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import by_script, run_main
from pipeline.errors import JobError, nearest, visible
from pipeline.versions import versions

FOLDER = Path(__file__).parent
FIRST = ("summarize", "submit", "batch", "report", "audit", "evaluate", "inspect", "demo")


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
    program = "stemline COMMAND" if by_script() else f"python -m {folder.name}.COMMAND"
    print(f"usage: {program} [flags]; --help explains the flags of a command\n")
    for name, about in commands(folder).items():
        print(f"  {name:18}{about}")


def main(arguments: Sequence[str]) -> int:
    """Run a command, or list them all; the exit code. Raises JobError."""
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        show()
        return 0
    if name == "--version":
        print(f"stemline {versions(('stemline',))['stemline']}")
        return 0
    if name not in (known := commands()):
        raise JobError(f"{visible(name)} is not a command{nearest(name, known) or '; see --help'}")
    inner = f"jobs.{name}.__main__" if (FOLDER / name).is_dir() else f"jobs.{name}"
    return importlib.import_module(inner).main(rest)


def script() -> None:
    """Entry point of the console script."""
    run_main(main)


if __name__ == "__main__":
    run_main(main)
