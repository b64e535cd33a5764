"""The scripts in examples/ run as they are, from another folder, and print what they promise."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from patience import patient

import stem_core.selection
from kernels.block_selection import select_blocks

ROOT = Path(__file__).parents[1]
FINDINGS = {
    row["document_id"]: row["findings"]
    for row in map(json.loads, (ROOT / "examples/findings.jsonl").read_text(encoding="utf-8").splitlines())
}
OPTICKS, JARGON = FINDINGS["newton-opticks-planted.txt"], FINDINGS["jargon-file-planted.txt"]


def run(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "RAY_TMPDIR": "/tmp",  # Ray's sockets need short paths
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # otherwise Ray leaves a token file in the home directory
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=patient(300), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_patch_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, so that one can see that every layer chose its blocks."""
    densities = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        selection = select_blocks(*args, **kwargs)
        densities.append(selection.density())
        return selection

    monkeypatch.setattr(stem_core.selection, "select_blocks", spy)
    example = ROOT / "examples/patch_model.py"
    runpy.run_path(str(example))
    told = capsys.readouterr().out
    assert all(finding in told for finding in OPTICKS)
    assert densities == [pytest.approx(0.3, abs=0.001)] * 8
    statements = ast.parse(example.read_text(encoding="utf-8")).body[1:]
    assert len(statements) <= 12, "it is shown as being short"


def test_notebook(tmp_path: Path) -> None:
    cells = re.findall(r"^# %%", (ROOT / "examples/notebook.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(cells) > 8
    told = run("notebook.py", tmp_path)
    assert all(finding in told for finding in OPTICKS + JARGON)
    assert "nothing: error its text is empty" in told
    assert len(re.findall(r"tokens  #{12} +0\.300", told)) == 2, "densities of the two documents"
    [release] = re.findall(r"^release +(.*)$", told, re.MULTILINE)
    assert [float(value) for value in release.split()] == [0.808, 0.596, 0.329, 0.25, 0.207]
    [folder] = tmp_path.glob("summaries-*")
    assert pq.read_table(folder).num_rows == 3


@pytest.mark.ray
def test_ray_data(tmp_path: Path) -> None:
    told = run("ray_data.py", tmp_path, str(tmp_path / "out"))
    assert all(finding in told for finding in OPTICKS)
    rows = {row["document_id"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert {name: (row["status"], row["year"]) for name, row in rows.items()} == {
        "opticks": ("ok", 1730), "blank": ("error", 2025),
    }  # fmt: skip
    assert rows["opticks"]["density"] == pytest.approx(0.3, abs=0.001)
