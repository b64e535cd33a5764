"""Triton launches on the current GPU: every public operation makes its tensors' GPU the current one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from kernels import device
from kernels.dispatch import on_its_gpu

FOLDER = Path(kernels.__file__).parent


def functions_that_dispatch(file: Path) -> Iterator[tuple[str, bool]]:
    """Public functions of a module that call an implementation chosen at run time, and whether they are guarded."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "choose", "key_sums")):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if names & {"implementation", "_implementation", "reference", "triton", "gluon"}:
                yield node.name, any(getattr(mark, "id", "") == "on_its_gpu" for mark in node.decorator_list)


def test_every_operation_is_guarded() -> None:
    found = {}
    for file in sorted(FOLDER.glob("*/api.py")):
        if (file.parent / "triton.py").exists():
            found |= {f"{file.parent.name}.{name}": guarded for name, guarded in functions_that_dispatch(file)}
    assert len(found) >= 16, "fewer than there were: is the search blind?"
    assert not [name for name, guarded in found.items() if not guarded]


class OnGpu(torch.Tensor):
    """A tensor that says it is on cuda:1."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 1)  # type: ignore[assignment]


def test_the_tensors_gpu_is_current_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(index=0)

    @contextmanager
    def current(wanted: torch.device) -> Iterator[None]:
        before, now.index = now.index, wanted.index
        try:
            yield
        finally:
            now.index = before

    monkeypatch.setattr(device, "is_current", lambda asked: asked.index == now.index)
    monkeypatch.setattr(device, "current", current)

    @on_its_gpu
    def operation(x: Any, fail: bool = False) -> int:
        """Says so."""
        if fail:
            raise ValueError("no")
        return now.index

    x = torch.zeros(2).as_subclass(OnGpu)
    assert operation.__doc__ == "Says so."
    assert operation(x) == operation(x=x) == 1
    assert operation(torch.zeros(2)) == 0, "a CPU tensor changes nothing"
    with pytest.raises(ValueError, match="no"):
        operation(x, fail=True)
    assert now.index == 0
    now.index = 1
    monkeypatch.setattr(device, "current", None)
    assert operation(x) == 1, "nothing to switch where the GPU is current already"
