"""Imports run one way, in no circle, and what the wheel leaves out nothing in it needs."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package, and those that it may import: the ones below it.
BELOW = {
    "tools": {"jobs", "pipeline", "stem_core", "kernels"},
    "jobs": {"pipeline", "stem_core", "kernels"},
    "pipeline": {"stem_core", "kernels"},
    "stem_core": {"kernels"},
    "kernels": set(),
}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each of our modules that a file imports, in functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value.replace(":", ".")]  # what importlib or a worker is told to import
            if not all(part.isidentifier() for part in found[0].split(".")) or "." not in found[0]:
                continue
        else:
            continue
        for name in found:
            if name.partition(".")[0] in BELOW:
                yield node.lineno, name


def wrong_imports(package: str, folder: Path) -> list[str]:
    """Where a package imports one that is not below it."""
    allowed = BELOW[package] | {package}
    return [
        f"{path.relative_to(folder)}:{line} imports {name}"
        for path in sorted((folder / package).rglob("*.py"))
        for line, name in imports_of(path)
        if name.partition(".")[0] not in allowed
    ]


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_one_way(package: str) -> None:
    assert not wrong_imports(package, ROOT)


@pytest.mark.parametrize(
    "code",
    [
        "from tools.benchmark import attention",
        "import tools",
        "def late() -> None:\n    from tools.faults.runs import LIVE",
        'importlib.import_module("tools.docs")',
        'run(job, engine_factory="tools.faults.engines:CountingEngine")',
    ],
)
def test_such_an_import_would_be_found(code: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/summarize.py").write_text(code, encoding="utf-8")
    assert wrong_imports("jobs", tmp_path)
    assert [package for package in BELOW if "jobs" in BELOW[package]] == ["tools"]


def graph(package: str) -> dict[str, set[str]]:
    """The modules of a package, and which of them each one imports."""
    names = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in names.items():
        found[module] = set()
        for _, name in imports_of(path):
            target = name if name in names else name.rpartition(".")[0]
            if target in names and target != module:
                found[module].add(target)
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reaches(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [*edges[module]]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += edges[name]
        return seen

    return sorted(module for module in edges if module in reaches(module))


@pytest.mark.parametrize("package", ["tools", "jobs"])
def test_no_imports_in_a_circle(package: str) -> None:
    assert not circles(graph(package))


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_tools_stay_out_of_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packed = settings["setuptools"]["packages"]["find"]["include"]
    for package in BELOW:
        assert any(fnmatchcase(f"{package}.room", pattern) for pattern in packed) == (package != "tools"), package
    assert set(settings["mypy"]["packages"]) == set(BELOW)
