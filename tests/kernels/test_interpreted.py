"""Runs each file of interpreted/ in a process of its own, with Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import patient

FOLDER = Path(__file__).parent / "interpreted"
# The interpreter multiplies by NumPy, whose OpenBLAS has kernels for each kind of x86 CPU. By some of them (Haswell's,
# which newer AMD ones get) a row of a product depends on the other rows: bits could not be compared. Any CPU has these.
SAME_PRODUCTS = {"OPENBLAS_CORETYPE": "Nehalem"}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **SAME_PRODUCTS}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=patient(300)
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
