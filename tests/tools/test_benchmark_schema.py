"""The benchmark of schemas, on the bundled model: its file, its verdict, and that it reports nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tools.benchmark.schema as benchmark
from pipeline.errors import JobError
from tools.benchmark.__main__ import main

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-reader")
FLAGS = ["schema", "--model", MODEL, "--device", "cpu", "--answers", "4", "--rows", "2", "--sentences", "1"]
FLAGS += ["--steps", "20", "--repeats", "1", "--max-new-tokens", "400", "--commit", "abc"]


def test_answers_and_steps_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    assert main([*FLAGS, "--output", str(path)]) in (0, 2)
    found = json.loads(path.read_text())
    assert found["valid"]["answers"] == 4
    assert [(row["rows"], row["schemas"], row["steps"]) for row in found["steps"]] == [
        (2, arm, 20) for arm in benchmark.ARMS
    ]
    assert found["steps"][0]["ratio"] == 1.0
    assert "4 answers, all valid" in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "code"), [(1.05, 0), (1.06, 2)])
def test_the_verdict(ratio: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "answers", lambda _: {"answers": 1, "different": 1, "seconds": 1.0})
    row = {"rows": 8, "schemas": "all", "step_ms": 1.0, "ratio": ratio, "steps": 9}
    monkeypatch.setattr(benchmark, "step_times", lambda _, rows: [row])
    assert main(FLAGS) == code


def test_nothing_is_reported_when_an_answer_is_wrong() -> None:
    with pytest.raises(JobError, match=r"4 of 4 answers are wrong; r00000: the answer is cut off"):
        main([*FLAGS, "--max-new-tokens", "3"])
