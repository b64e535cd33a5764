"""How kernels/ is cut: an operation's folder imports what is shared and what other operations export, nothing else."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels

KERNELS = Path(kernels.__file__).parent
# Beside the operations: for them and for callers.
OPEN = ("dispatch", "device")
LAYERS = ("stem_core", "pipeline", "jobs", "tools")


def imported(file: Path) -> Iterator[tuple[str, str, int]]:
    """(module, name or "", line) of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name, node.lineno) for alias in node.names)


def exports(operation: Path) -> set[str]:
    """The names in `__all__` of an operation's folder."""
    for node in ast.parse((operation / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def operations(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("[a-z]*/__init__.py"))


def private_imports(folder: Path) -> list[str]:
    """What modules of a kernels/ folder import that is none of their business, one line each."""
    faults = []
    for home in (*operations(folder), folder / "_common"):
        for file in sorted(home.glob("*.py")):
            for module, name, line in imported(file):
                package, _, rest = module.partition(".")
                if package != "kernels":
                    continue
                owner, _, inside = (rest or name).partition(".")
                if owner in (home.name, "_common", *OPEN):
                    continue
                if home.name != "_common" and not inside and rest and name in exports(folder / owner):
                    continue
                faults.append(f"{home.name}/{file.name}:{line} takes {name or 'all'} from {module}")
    return faults


def more_than_exports(folder: Path) -> list[str]:
    """Folders of operations without api.py or reference.py, or whose __init__.py does more than export."""
    faults = []
    for home in operations(folder):
        faults += [
            f"{home.name}/{name} is missing" for name in ("api.py", "reference.py") if not (home / name).exists()
        ]
        for node in ast.parse((home / "__init__.py").read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not (docstring or isinstance(node, ast.ImportFrom | ast.Assign)):
                faults.append(f"{home.name}/__init__.py:{node.lineno} is more than an export")
    return faults


def test_operations_import_no_private_modules_of_one_another() -> None:
    assert len(operations(KERNELS)) >= 12, "fewer than there were: is the search blind?"
    assert not private_imports(KERNELS)


def test_folders_of_operations_look_alike() -> None:
    assert not more_than_exports(KERNELS)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_shared_stays_inside(layer: str) -> None:
    files = list((KERNELS.parent / layer).rglob("*.py"))
    assert files
    assert not [
        f"{file}:{line}" for file in files for module, _, line in imported(file) if module.startswith("kernels._common")
    ]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("rope/triton.py", "from kernels.silu_mul.triton import gated"),
        ("rope/api.py", "from kernels.silu_mul import triton"),
        ("rope/api.py", "from kernels.silu_mul import _check"),
        ("rope/reference.py", "from kernels import silu_mul"),
        ("rope/reference.py", "import kernels.silu_mul.reference"),
        ("rope/api.py", "def f():\n    from kernels.silu_mul.api import silu_mul"),
        ("_common/rows.py", "from kernels.silu_mul import silu_mul"),
    ],
)
def test_a_private_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy)
    before = private_imports(copy)
    target = copy / file
    target.write_text(target.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    [found] = set(private_imports(copy)) - set(before)
    assert found.startswith(f"{file}:")


def test_a_public_name_of_another_operation_is_allowed(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy)
    target = copy / "rope/api.py"
    target.write_text(target.read_text(encoding="utf-8") + "\nfrom kernels.silu_mul import silu_mul\n")
    assert private_imports(copy) == private_imports(KERNELS)


def test_code_in_an_init_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy)
    target = copy / "rope/__init__.py"
    target.write_text(target.read_text(encoding="utf-8") + "\ndef f() -> None:\n    pass\n")
    (copy / "silu_mul/api.py").unlink()
    [code, missing] = sorted(set(more_than_exports(copy)) - set(more_than_exports(KERNELS)))
    assert code.startswith("rope/__init__.py:")
    assert missing == "silu_mul/api.py is missing"
