"""The recall floor: what the tasks of jobs.evaluate find under the presets, and under a window."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate.arms import make_arms
from jobs.evaluate.haystacks import KINDS
from jobs.evaluate.run import read_document
from jobs.known.prompts import Tokenizer, make_document, read_prompts
from jobs.known.reader import Reader
from jobs.known.wording import REPORT
from pipeline.engine import EngineConfig

MODEL = str(Path(__file__).parents[2] / "models/tiny-reader")
TASKS = ("report_facts", "lookup", "niah_essay", "multikey_4")
LENGTH = 2048  # 128 blocks of 16
# (arm, lowest, highest): questions at the end of the document and values that are said twice, together.
FLOORS = [
    ("sampled:density=0.3", 0.95, 1.0),  # examples/demo.yaml
    ("release:density=0.25", 0.7, 1.0),
    ("window:density=0.25", 0.0, 0.6),  # else the floors would hold whatever the selection does
]


@cache
def recall_by_arm() -> dict[str, float]:
    tokenizer = Tokenizer(MODEL)
    reader = Reader(EngineConfig(MODEL, device="cpu"), LENGTH + 512)
    reader.allocate(1.0)
    arms = make_arms([spec for spec, _, _ in FLOORS], 16)
    rows = []
    for kind in ("report", "essay"):
        made = make_document(KINDS[kind], LENGTH, 0, REPORT, tokenizer, 4, seed=11).only(TASKS)
        rows += read_document(read_prompts(made, REPORT, tokenizer), [reader], arms, tokenizer)
    return {arm.name: float(np.mean([row["recall"] for row in rows if row["arm"] == arm.name])) for arm in arms}


@pytest.mark.parametrize(("spec", "lowest", "highest"), FLOORS)
def test_recall(spec: str, lowest: float, highest: float) -> None:
    assert lowest <= recall_by_arm()[spec] <= highest
