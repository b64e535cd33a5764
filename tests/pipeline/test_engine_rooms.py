"""The engine's rooms: which imports which, and that no import leads back to where it began."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pipeline

ROOT = Path(pipeline.__file__).parents[1]
ENGINE = "pipeline.engine"
# What each room (a folder, or a module beside the folders) imports of the others. A new arrow belongs here only if it
# points to a room further up.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "devices": {"config"},
    "kv": {"devices"},
    "model": {"config", "devices", "kv"},
    "run": {"kv", "model"},
    "memory": {"config", "devices", "kv", "model", "run"},
    "describe": {"config", "model"},
    "document": {"config", "kv", "memory", "run"},
    "engine": {"config", "devices", "model", "run", "memory", "describe", "document"},
    "probes": {"config", "kv", "model", "run", "document", "engine"},
}


def modules(root: Path) -> dict[str, Path]:
    """The files of the engine below `root` by their import names."""
    found = {}
    for path in sorted((root / "pipeline" / "engine").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Names of modules, or of what is in them, that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(root: Path) -> dict[str, set[str]]:
    """The engine's modules, and the modules of the engine that each imports."""
    known = modules(root)
    return {
        name: {other for other in imported(path) if other in known} - {name, ENGINE} for name, path in known.items()
    }


def between_rooms(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms, and the rooms that each imports; the package's own face, which imports what it shows, left out."""
    rooms: dict[str, set[str]] = {}
    for name, others in found.items():
        if name != ENGINE:
            rooms.setdefault(room(name), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in rooms.items()}


def room(module: str) -> str:
    return module.split(".")[2]


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, the first one again at its end; empty if there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_rooms_import_what_the_table_says() -> None:
    assert between_rooms(arrows(ROOT)) == ROOMS


def test_arrows_between_rooms_run_one_way() -> None:
    assert circle(ROOMS) == []
    above: list[str] = []
    for name, others in ROOMS.items():
        assert others <= set(above), f"{name} imports a room that the table has below it"
        above.append(name)


def test_no_module_leads_back_to_itself() -> None:
    found = arrows(ROOT)
    assert len(found) > 20
    assert circle(found) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kv/arena.py", "from pipeline.engine.model.runner import ModelRunner"),
        ("kv/arena.py", "def late():\n    import pipeline.engine.run.batch"),
        ("model/loading.py", "from pipeline.engine.memory import plan"),
    ],
)
def test_an_arrow_that_points_back_is_seen(tmp_path: Path, module: str, line: str) -> None:
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert between_rooms(arrows(tmp_path)) == ROOMS
    changed = tmp_path / "pipeline" / "engine" / module
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert between_rooms(arrows(tmp_path)) != ROOMS
    assert circle(between_rooms(arrows(tmp_path)))
