"""The scripts in examples/ run as they are, from another folder, and print what they promise.

In this process, where everything is imported, and on the tests' Ray cluster.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

import stem_core.selection
from kernels.block_selection import select_blocks
from stem_core.fp8 import sensitive_linears

ROOT = Path(__file__).parents[1]
FINDINGS = {
    row["document_id"]: row["findings"]
    for row in map(json.loads, (ROOT / "examples/findings.jsonl").read_text(encoding="utf-8").splitlines())
}
# Of these documents the last four fifths: the shorter the quicker, and below 6,144 tokens all is dense.
PARTS = {
    name: text[len(text) // 5 :]
    for name in ("newton-opticks-planted.txt", "jargon-file-planted.txt")
    for text in [(ROOT / "examples/documents" / name).read_text(encoding="utf-8")]
}
OPTICKS, JARGON = ([line for line in FINDINGS[name] if line in text] for name, text in PARTS.items())


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(name, *arguments): what an example prints in a checkout with PARTS, started in `tmp_path`."""
    checkout = tmp_path / "checkout"
    (checkout / "examples" / "documents").mkdir(parents=True)
    (checkout / "models").symlink_to(ROOT / "models")
    for name, text in PARTS.items():
        (checkout / "examples" / "documents" / name).write_text(text, encoding="utf-8")

    def call(name: str, *arguments: str) -> str:
        example = shutil.copy(ROOT / "examples" / name, checkout / "examples")
        monkeypatch.setattr(sys, "argv", [str(example), *arguments])
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(example), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_store_fp8(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-compressor is not here. What it is told: pieces of texts, and to leave the linears that the engine leaves."""
    told: dict[str, Any] = {}
    modules = {name: ModuleType(name) for name in ("datasets", "llmcompressor", "llmcompressor.modifiers")}
    modules["llmcompressor.modifiers.quantization"] = quantization = ModuleType("quantization")
    quantization.GPTQModifier = lambda **options: told.update(options)  # type: ignore[attr-defined]
    modules["datasets"].Dataset = SimpleNamespace(from_dict=lambda columns: columns)  # type: ignore[attr-defined]
    modules["llmcompressor"].oneshot = lambda **options: told.update(options)  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, out, save_compressed: told.update(compressed=save_compressed) or save(self, out),
    )
    text, other = (str(ROOT / "examples/documents" / name) for name in ("jargon-file.txt", "newton-opticks.txt"))
    model = str(ROOT / "models/tiny-reader")
    assert run("store_fp8.py", model, text, other, "out") == "written: out\n"
    pieces = told["dataset"]["input_ids"]
    assert {len(piece) for piece in pieces} == {1024}
    assert told["num_calibration_samples"] == len(pieces) == 12
    assert told["compressed"]
    linears = {name for name, module in told["model"].named_modules() if isinstance(module, torch.nn.Linear)}
    left = {
        name for name in linears for kept in told["ignore"] if name == kept or re.match(kept.removeprefix("re:"), name)
    }
    skipped = sensitive_linears(told["model"])
    assert left == {name for name in linears if name in skipped or name.rpartition(".")[2] in skipped}
    for arguments, problem in (
        ((model, text), "usage: "), ((model, text, "out"), "out exists already"),
        ((model, text, "new"), "12,288 or more are needed"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=problem):
            run("store_fp8.py", *arguments)


def test_patch_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer chooses its blocks."""
    densities = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        selection = select_blocks(*args, **kwargs)
        densities.append(selection.density())
        return selection

    monkeypatch.setattr(stem_core.selection, "select_blocks", spy)
    told = run("patch_model.py")
    assert all(finding in told for finding in OPTICKS)
    assert densities == [pytest.approx(0.3, abs=0.001)] * 8
    statements = ast.parse((ROOT / "examples/patch_model.py").read_text(encoding="utf-8")).body[1:]
    assert len(statements) <= 12, "it is shown as being short"


def test_notebook(run: Run, tmp_path: Path) -> None:
    cells = re.findall(r"^# %%", (ROOT / "examples/notebook.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(cells) > 8
    (tmp_path / "checkout/examples/documents/newton-opticks-planted.txt").unlink()  # the other examples read it
    told = run("notebook.py")
    assert all(finding in told for finding in JARGON)
    assert "nothing: error its text is empty" in told
    assert len(re.findall(r"tokens  #{12} +0\.300", told)) == 1, "the document's density"
    [release] = re.findall(r"^release +(.*)$", told, re.MULTILINE)
    assert [float(value) for value in release.split()] == [0.808, 0.596, 0.329, 0.25, 0.207]
    [folder] = tmp_path.glob("summaries-*")
    assert pq.read_table(folder).num_rows == 2


@pytest.mark.ray
def test_ray_data(ray_cluster: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, Any] = {}
    monkeypatch.setattr("ray.init", lambda **options: begun.update(options))
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"])  # the example puts another in its place
    told = run("ray_data.py", str(tmp_path / "out"))
    assert begun == {"address": "local", "log_to_driver": False}
    assert all(finding in told for finding in OPTICKS)
    rows = {row["document_id"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert {name: (row["status"], row["year"]) for name, row in rows.items()} == {
        "opticks": ("ok", 1730), "blank": ("error", 2025),
    }  # fmt: skip
    assert rows["opticks"]["density"] == pytest.approx(0.3, abs=0.001)
