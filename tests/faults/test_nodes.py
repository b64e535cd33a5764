"""A node of the cluster leaves while it works, and another joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.faults.runs import AHEAD, LIVE

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_a_node_that_leaves_costs_no_document(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(ROOT)
    script = Path(__file__).with_name("node_script.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    assert (told["code"], told["lost"], told["doubled"]) == (0, 0, 0), told
    assert told["statuses"] == {"ok": 1500}
    assert "lost with" in told["log"], "its worker was missed"
    assert told["again"] <= LIVE + AHEAD
