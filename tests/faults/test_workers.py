"""Workers that die, hang or cannot do one document, with a real model of two narrow layers.

More deaths of workers: in prefill in test_determinism, in decode in test_table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from patience import patient

from pipeline import read_results
from pipeline.engine.model import loading
from pipeline.errors import JobError
from pipeline.job.dry_run import describe_plan
from pipeline.job.job import run
from pipeline.prompts.tokens import Tokens
from pipeline.results.summary import JobReport
from pipeline.settings.config import JobConfig
from pipeline.workers.worker import Worker
from tools.faults.corpus import write_model

WORDS = "the harbour committee reviewed the winter budget "
TEXTS = {"victim": WORDS * 60, **{f"d{i}": WORDS * (40 + i) for i in range(5)}}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def job_config(tmp_path: Path, model: Path, texts: dict[str, str] = TEXTS, **settings: Any) -> JobConfig:
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    values = {"input": str(docs), "output": str(tmp_path / "out"), "model": str(model), "device": "cpu", "workers": 1}
    values |= {"max_new_tokens": 6, "chunk_tokens": 128, "max_live": 3, "question": "What?"}
    return JobConfig(**(values | settings))  # type: ignore[arg-type]


def job(tmp_path: Path, model: Path, engine: str, texts: dict[str, str] = TEXTS, **settings: Any) -> JobReport:
    return run(job_config(tmp_path, model, texts, **settings), engine_factory=engine, grace=1.0)


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    found = read_results(tmp_path / "out").to_pylist()
    assert len({row["document_id"] for row in found}) == len(found), "one row a document"
    return {row["document_id"]: row for row in found}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_results_that_wait_to_be_written_survive_their_worker(tmp_path: Path, tiny: Path) -> None:
    report = job(tmp_path, tiny, "tools.faults.engines:DiesAfterResults", flush_documents=1000, flush_seconds=1000)
    assert (tiny / "results.once").exists(), "the worker was killed"
    assert report.counts == {"ok": len(TEXTS)}
    attempts = [row["attempts"] for row in rows(tmp_path).values()]
    assert attempts.count(1) >= 3, "what was handed over is not computed again"
    assert attempts.count(2) >= 1


@pytest.mark.usefixtures("ray_here")
def test_a_tokenizer_that_raises_costs_one_document(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokens, "encode_data", Tokens.encode_data)  # the engine puts another in its place
    report = job(tmp_path, tiny, "tools.faults.engines:BadTokenizer", TEXTS | {"bad": "BADTOKEN here"})
    assert report.counts == {"ok": len(TEXTS), "error": 1}
    assert rows(tmp_path)["bad"]["error"] == "OverflowError: the tokenizer has a fault"


@pytest.mark.usefixtures("ray_here")
def test_a_chat_template_that_raises_ends_the_job_with_its_message(tmp_path: Path, tiny: Path) -> None:
    (tiny / "chat_template.jinja").write_text("{{ raise_exception('only for assistants') }}")
    with pytest.raises(JobError, match=r"no worker could start in 3 tries.*only for assistants"):
        job(tmp_path, tiny, "pipeline.engine:Engine")


@pytest.mark.usefixtures("ray_here")
def test_out_of_memory_is_tried_once_more_in_smaller_chunks(tmp_path: Path, tiny: Path) -> None:
    report = job(tmp_path, tiny, "tools.faults.engines:ShortOfMemory", chunk_tokens=512)
    assert report.counts == {"ok": len(TEXTS)}
    found = rows(tmp_path)
    assert found["victim"]["attempts"] == 2
    assert {row["attempts"] for name, row in found.items() if name != "victim"} == {1}


@pytest.mark.usefixtures("ray_here")
def test_out_of_memory_in_the_smallest_chunks_is_a_row(tmp_path: Path, tiny: Path) -> None:
    report = job(tmp_path, tiny, "tools.faults.engines:ShortOfMemory", chunk_tokens=4096)
    assert report.counts == {"ok": len(TEXTS) - 1, "oom": 1}
    row = rows(tmp_path)["victim"]
    assert row["attempts"] == 2
    assert "out of memory" in row["error"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_document_that_freezes_the_whole_process_times_out_alone(tmp_path: Path, model: Path) -> None:
    texts = {"a": "text", "frozen": "FREEZE " * 9, "b": "more text"}
    report = job(tmp_path, model, "fake_engine:FakeEngine", texts, deadline=patient(1.0))
    assert report.counts == {"ok": 2, "timeout": 1}
    assert rows(tmp_path)["frozen"]["attempts"] == 2


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "logit soft-capping"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_a_refused_model_ends_the_job_as_it_ends_the_dry_run(
    changes: dict[str, Any], reason: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: its weights are not loaded for it, and no second worker tries."""
    own = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(own | changes))
    monkeypatch.setattr(loading, "_from_files", lambda *_: pytest.fail("its weights are loaded"))
    started = []
    monkeypatch.setattr(Worker, "load", lambda worker, load=Worker.load: started.append(worker) or load(worker))
    with pytest.raises(JobError) as dry:
        list(describe_plan(job_config(tmp_path, tiny)))
    with pytest.raises(JobError) as real:
        run(job_config(tmp_path, tiny))
    assert str(real.value) == str(dry.value)
    assert reason in str(real.value)
    assert len(started) == 1


@pytest.mark.usefixtures("ray_here")
def test_a_model_that_is_not_there_for_the_workers_ends_the_job(tmp_path: Path, tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(JobError, match=r"no worker could start in 3 tries; the last reason: .*cannot load model"):
        job(tmp_path, tiny, "pipeline.engine:Engine")
