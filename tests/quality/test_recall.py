"""The recall floor: what the tasks of jobs.evaluate find under Stem, the demo's settings, and no selection."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate.arms import make_arms
from jobs.evaluate.attention import prepare_model
from jobs.evaluate.prompts import Tokenizer, make_document, read_prompts
from jobs.evaluate.reader import Reader
from jobs.evaluate.results import row_of
from jobs.evaluate.wording import REPORT
from pipeline.engine import EngineConfig
from pipeline.engine.loading import load_model, stop_token_ids

MODEL = str(Path(__file__).parents[2] / "models/tiny-reader")
TASKS = ("report_facts", "lookup", "niah_essay", "multikey_4")
LENGTH = 4096  # 256 blocks of 16
# (arm, lowest, highest): questions at the end of the document and values that are said twice, together.
FLOORS = [
    ("sampled:schedule=density,density=0.3", 0.95, 1.0),  # examples/demo.yaml
    ("stem:density=0.25", 0.7, 1.0),
    ("window:density=0.25", 0.0, 0.6),  # else the floors would hold whatever the selection does
]


@cache
def recall_by_arm() -> dict[str, float]:
    tokenizer = Tokenizer(MODEL)
    model = load_model(EngineConfig(MODEL, device="cpu"))
    reader = Reader(prepare_model(model), stop_token_ids(model), chunk_tokens=LENGTH, cached_tokens=100_000)
    readings = [
        read_prompts(make_document(kind, LENGTH, 0, REPORT, tokenizer, 4, seed=11).only(TASKS), REPORT, tokenizer)
        for kind in ("report", "essay")
    ]
    arms = make_arms([spec for spec, _, _ in FLOORS], [16], [0.25], [0], dense_layers=0)
    rows = [row_of(answer, 8, tokenizer.decode) for answer in reader.read(readings, arms, {}, frozenset())]
    return {spec: float(np.mean([row["recall"] for row in rows if row["arm"] == spec])) for spec, _, _ in FLOORS}


@pytest.mark.parametrize(("spec", "lowest", "highest"), FLOORS)
def test_recall(spec: str, lowest: float, highest: float) -> None:
    assert lowest <= recall_by_arm()[spec] <= highest
