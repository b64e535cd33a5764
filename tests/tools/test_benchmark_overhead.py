"""The overhead benchmark: its arithmetic, its verdict and its file. The pipeline itself is stubbed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tools.benchmark.overhead as benchmark
from pipeline.errors import JobError
from tools.benchmark.__main__ import main


def pipeline(monkeypatch: pytest.MonkeyPatch, *, span: float = 6.0, failed: int = 0) -> list[Any]:
    """Replace the job: `span` seconds of workers' time, 5 of them computing. Returns what it was called with."""
    calls: list[Any] = []

    def run(config: Any) -> SimpleNamespace:
        lines = Path(config.input[0]).read_text(encoding="utf-8").splitlines()
        calls.append((config, [json.loads(line) for line in lines]))
        stats = {
            "workers": config.workers, "span_seconds": span, "engine_seconds": 5.0, "reader_seconds": 0.5,
            "seconds": 4.0,
        }  # fmt: skip
        return SimpleNamespace(ok=len(lines) - failed, failed=failed, first_errors=["boom"], stats=stats)

    monkeypatch.setattr(benchmark, "run", run)
    return calls


def test_what_the_engine_did_not_compute_is_overhead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pipeline(monkeypatch)
    path = tmp_path / "overhead.json"
    flags = ["--documents", "100", "--workers", "3", "--max-new-tokens", "4", "--model", "m", "--commit", "abc"]
    assert main(["overhead", *flags, "--output", str(path)]) == 0
    ((config, documents),) = calls
    assert (config.workers, config.max_new_tokens, config.model) == (3, 4, "m")
    assert len({document["id"] for document in documents}) == 100
    assert all(document["text"] for document in documents)
    content = json.loads(path.read_text())
    assert content["commit"] == "abc"
    figures = content["figures"]
    assert figures["overhead_ms_per_document"] == pytest.approx(10.0)
    assert figures["engine_ms_per_document"] == pytest.approx(50.0)
    assert figures["documents_per_hour"] == pytest.approx(90_000)
    assert "overhead_ms_per_document" in capsys.readouterr().out


@pytest.mark.parametrize(("span", "code"), [(6.5, 0), (6.6, 2)])
def test_the_target_decides_the_exit_code(span: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline(monkeypatch, span=span)
    assert main(["overhead", "--documents", "100"]) == code


def test_a_document_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline(monkeypatch, failed=1)
    path = tmp_path / "overhead.json"
    with pytest.raises(JobError, match=r"1 of 20 documents failed: .*boom"):
        main(["overhead", "--documents", "20", "--output", str(path)])
    assert not path.exists()
