"""The rooms of pipeline/ and of its engine: which imports which, and that no import leads back to where it began."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pipeline

ROOT = Path(pipeline.__file__).parents[1]
Rooms = dict[str, set[str]]

# What each room (a folder, or a module beside the folders) of a package imports of the others. A new arrow belongs here
# only if it points to a room further up.
PACKAGES: dict[str, Rooms] = {
    "pipeline": {
        "redact": set(),
        "versions": set(),
        "interruptible": set(),
        "imports": set(),
        "decoding": set(),
        "converters": {"decoding"},
        "errors": {"redact"},
        "model_files": {"errors"},
        "adapters": {"model_files"},
        "location": {"interruptible", "errors"},
        "review": set(),
        "results": {"interruptible", "errors", "location", "review"},
        "prompts": {"errors", "model_files"},
        "answers": {"errors", "results"},
        "settings": {"answers", "errors", "prompts"},
        "source": {"interruptible", "converters", "decoding", "errors", "location", "results", "settings"},
        "engine": {"adapters", "answers", "errors", "model_files", "results", "settings", "versions"},
        "inputs": {"errors", "location", "results", "settings", "source"},
        "workers": {
            "answers", "engine", "errors", "imports", "inputs", "interruptible", "prompts", "results", "review",
            "settings", "source",
        },
        "job": {
            "adapters", "interruptible", "answers", "engine", "errors", "imports", "location", "model_files", "prompts",
            "results", "settings", "source", "versions", "workers",
        },
        "api": {"answers", "errors", "imports", "inputs", "job", "results", "settings", "source", "workers"},
        "ray_data": {"api", "errors", "inputs", "results", "settings", "source"},
    },
    "pipeline.engine": {
        "config": set(),
        "laps": set(),
        "devices": {"config"},
        "kv": {"devices"},
        "model": {"config", "devices", "kv", "laps"},
        "run": {"kv", "model"},
        "memory": {"config", "devices", "kv", "model", "run"},
        "describe": {"config", "model"},
        "document": {"config", "kv", "memory", "run"},
        "prefix": {"kv", "run", "document"},
        "engine": {"config", "devices", "kv", "laps", "model", "run", "memory", "describe", "document", "prefix"},
        "probes": {"config", "kv", "model", "run", "document", "engine"},
    },
}  # fmt: skip


def modules(root: Path, package: str) -> dict[str, Path]:
    """The files of a package below `root` by their import names."""
    found = {}
    for path in sorted(root.joinpath(*package.split(".")).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """Names of modules, or of what is in them, that a file imports anywhere, inside functions too, but for types."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def arrows(root: Path, package: str) -> dict[str, set[str]]:
    """A package's modules, and the modules of it that each imports; its own face, which shows them, left out."""
    known = modules(root, package)
    del known[package]
    found = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for name, path in known.items()}
    return {name: {other for other in others if other in known} - {name} for name, others in found.items()}


def between_rooms(root: Path, package: str) -> Rooms:
    """A package's rooms, and the rooms that each imports."""
    rooms: Rooms = {}
    depth = len(package.split("."))
    for name, others in arrows(root, package).items():
        rooms.setdefault(name.split(".")[depth], set()).update(other.split(".")[depth] for other in others)
    return {name: others - {name} for name, others in rooms.items()}


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, the first one again at its end; empty if there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_what_the_table_says(package: str) -> None:
    assert between_rooms(ROOT, package) == PACKAGES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_rooms_run_one_way(package: str) -> None:
    above: list[str] = []
    for name, others in PACKAGES[package].items():
        assert others <= set(above), f"{name} imports a room that the table has below it"
        above.append(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_leads_back_to_itself(package: str) -> None:
    found = arrows(ROOT, package)
    assert len(found) > 20
    assert circle(found) == []


@pytest.mark.parametrize(
    ("package", "module", "line"),
    [
        ("pipeline.engine", "kv/arena.py", "from pipeline.engine.model.runner import ModelRunner"),
        ("pipeline.engine", "kv/arena.py", "def late():\n    import pipeline.engine.run.batch"),
        ("pipeline.engine", "model/loading.py", "from pipeline.engine.memory import plan"),
        ("pipeline", "results/sink.py", "from pipeline.source import files"),
        ("pipeline", "settings/config.py", "def late():\n    from pipeline.workers.worker import Worker"),
    ],
)
def test_an_arrow_that_points_back_is_seen(tmp_path: Path, package: str, module: str, line: str) -> None:
    for path in modules(ROOT, package).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert between_rooms(tmp_path, package) == PACKAGES[package]
    changed = tmp_path.joinpath(*package.split("."), module)
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert between_rooms(tmp_path, package) != PACKAGES[package]
    assert circle(between_rooms(tmp_path, package))
