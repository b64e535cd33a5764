"""The benchmark of prompt lookup, on the bundled model: its figures, its file, and what it says where outputs part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.engine import EngineConfig
from pipeline.engine.probes.teacher_forcing import TeacherForcingEngine
from pipeline.errors import JobError
from tools.benchmark.__main__ import main
from tools.benchmark.engine.agreement import MODEL, report_prompts
from tools.benchmark.engine.phases import run_documents
from tools.benchmark.lookup import margins_where_parted

FLAGS = ["lookup", "--model", str(MODEL), "--device", "cpu", "--tokens", "300", "--new-tokens", "16", "--rows", "2"]


def test_both_settings_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The harbour of Emden was closed in May. Ada Lang repaired the pump. " * 60, encoding="utf-8")
    path = tmp_path / "lookup.json"
    assert main([*FLAGS, "--text", str(text), "--documents", "2", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["asked"] for row in found["rows"]] == ["summary", "extraction"]
    for row, written in zip(found["rows"], found["outputs"], strict=True):
        assert min(row["off_seconds"], row["auto_seconds"]) > 0
        assert row["parted"] == 0, "on a CPU both write the same"
        assert written["off"] == written["auto"]
    assert "tokens_per_step" in capsys.readouterr().out


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    with pytest.raises(JobError, match="16 documents of 300 take 4,800: give a longer text"):
        main([*FLAGS, "--text", str(text)])


def test_margins_are_those_of_the_model_where_outputs_part() -> None:
    """The second output is the first with its third token replaced: the model prefers its own, by what it says."""
    (prompt,) = report_prompts([1200])
    config = EngineConfig(str(MODEL), device="cpu", precision="fp32", max_live=2, arena_tokens=2048)
    engine = TeacherForcingEngine(config)
    _, (done,) = run_documents(engine, [prompt], 6)
    own = done.token_ids
    changed = [*own[:2], own[2] + 1, *own[3:]]
    (margin,) = margins_where_parted(engine, [prompt, prompt], [own, own], [changed, own])
    (back,) = margins_where_parted(engine, [prompt], [changed], [own])
    assert margin > 0
    assert back == pytest.approx(-margin)


def test_a_document_that_cannot_be_read_again_is_no_agreement() -> None:
    """Its outputs part, and no margin would be found: it must not count as one that does not part."""
    (prompt,) = report_prompts([1200])
    engine = TeacherForcingEngine(EngineConfig(str(MODEL), device="cpu", precision="fp32", arena_tokens=2048))
    with pytest.raises(JobError, match=r"document 0, read again, ended with too_long"):
        margins_where_parted(engine, [[*prompt] * 9], [[5, 6]], [[5, 7]])
