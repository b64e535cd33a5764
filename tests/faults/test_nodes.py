"""A node of the cluster is killed while it works, and another joins; --workers auto follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import patient
from shell import shell

from tools.faults.runs import AHEAD, LIVE

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_a_node_that_dies_costs_no_document_and_one_that_joins_works(tmp_path: Path) -> None:
    environment = shell() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    script = Path(__file__).with_name("node_script.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=patient(300),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    assert (told["code"], told["lost"], told["doubled"]) == (0, 0, 0), told
    assert told["statuses"] == {"ok": 400}
    assert "lost with" in told["log"], "its worker was missed"
    assert told["again"] <= LIVE + AHEAD
    assert "shrunk: 1 workers instead of 2" in told["log"]
    assert "grown: 2 workers instead of 1" in told["log"]
    assert "could not start" not in told["log"], "no worker was asked for that there is no room for"
    assert told["rows_by_worker"][told["late_worker"]] > 10, "the new node works"
