"""How a job starts: what its processes import, and what they tell of where the seconds went."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import Summarizer
from pipeline.engine import Engine, EngineConfig
from pipeline.engine.laps import Laps
from pipeline.errors import JobError
from pipeline.imports import collecting_later
from pipeline.results.summary import JobReport, rows_for_table
from pipeline.workers import worker
from tests.patience import patient

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-reader"

# Packages that take a tenth of a second and more to import, or that few jobs use.
HEAVY = {
    "torch", "transformers", "ray", "llguidance", "py3langid", "rapidfuzz", "jsonschema", "pandas", "plotly", "scipy",
    "sklearn", "torchvision", "matplotlib", "peft", "datasets",
}  # fmt: skip
# A worker's first steps; what comes behind them is the engine.
WORKER = """
from pipeline.engine.config import EngineConfig
from pipeline.workers.job_questions import load_prompting
from pipeline.engine import Engine
config = EngineConfig(model="{model}", device="cpu", arena_tokens=1024)
own, tokens = load_prompting(config)
engine = Engine(config)
"""
SCHEMA = """
from pipeline.answers.schema import compile_schema
schema = compile_schema('{"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}')
schema.grammar(tokens.tokenizer, tokens.eos_ids)
"""


def imported(code: str, cwd: Path = ROOT) -> set[str]:
    """Those of HEAVY that a process has imported after `code`."""
    told = "import sys, json; names = {name.partition('.')[0] for name in sys.modules}\n"
    told += "sys.stderr.write('\\n' + json.dumps(sorted(names)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{told}"], cwd=cwd, capture_output=True, text=True, timeout=patient(120)
    )
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def job(arguments: list[str]) -> str:
    """A command line's code, up to its exit."""
    imports = "from jobs.cli import run_main\nfrom jobs.summarize import main"
    return f"{imports}\ntry:\n    run_main(main, {arguments!r})\nexcept SystemExit:\n    pass"


def test_help_imports_nothing_heavy() -> None:
    assert imported(job(["--help"])) == set()


def test_driver_imports_ray_and_no_torch() -> None:
    code = "import pipeline.job.job, pipeline.job.ray_run, pipeline.workers.ray_pool"
    assert imported(code) <= {"ray", "jsonschema"}  # the latter is Ray's


@pytest.mark.parametrize("package", ["pipeline.engine", "pipeline.engine.config", "pipeline.workers.worker"])
def test_what_a_driver_needs_of_engine_and_worker_is_light(package: str) -> None:
    assert imported(f"import {package}") == set()


def test_dry_run_imports_model_and_tokenizer_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A short report.", encoding="utf-8")
    arguments = ["--input", f"{tmp_path}/one.txt", "--output", f"{tmp_path}/out", "--model", str(MODEL), "--dry-run"]
    assert imported(job(arguments)) == {"torch", "transformers"}


def test_worker_imports_what_it_runs() -> None:
    assert imported(WORKER.format(model=MODEL)) == {"torch", "transformers"}


def test_worker_imports_before_it_loads() -> None:
    """All but some tens of the 3,000 modules: those of the model's type, of its tokenizer, of its files."""
    code = "import sys\nfrom pipeline.workers.worker import _import_engine\n_import_engine()\nbefore = len(sys.modules)"
    code += WORKER.format(model=MODEL) + "assert len(sys.modules) < before + 150, len(sys.modules) - before"
    assert imported(code) == {"torch", "transformers"}


def test_worker_with_a_schema_imports_its_grammar_too() -> None:
    pytest.importorskip("llguidance")
    assert imported(WORKER.format(model=MODEL) + SCHEMA) == {"torch", "transformers", "llguidance", "jsonschema"}


def test_a_heavy_import_is_seen() -> None:
    assert imported("import rapidfuzz") == {"rapidfuzz"}


def test_pandas_is_there_for_those_who_ask() -> None:
    code = "from pipeline.imports import without_pandas\nwithout_pandas()\nimport pyarrow as pa\n"
    pytest.importorskip("pandas")
    assert imported(code + "table = pa.table({'a': [1, 2]})") == set()
    assert imported(code + "assert len(pa.table({'a': [1, 2]}).to_pandas()) == 2") == {"pandas"}
    assert imported("import pyarrow as pa\npa.array([1])") == {"pandas"}  # else without_pandas() is not needed


def test_what_is_made_while_collection_waits_is_old_and_can_be_collected() -> None:
    with collecting_later():
        assert not gc.isenabled()
        made = [object]
    assert gc.isenabled()
    assert any(made is item for item in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with collecting_later():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


def test_collection_waits_while_a_worker_imports_and_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, bool]] = []

    def fails(config: object) -> None:
        waits.append(("tokenizer", not gc.isenabled()))
        raise JobError("no tokenizer")

    monkeypatch.setattr(worker, "_import_engine", lambda: waits.append(("imports", not gc.isenabled())))
    monkeypatch.setattr(worker, "JobQuestions", fails)
    with pytest.raises(JobError, match="no tokenizer"):
        Summarizer(model=MODEL).load()
    assert waits == [("imports", True), ("tokenizer", True)]
    assert gc.isenabled()


def test_laps_add_up_to_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.5, 14.0])
    monkeypatch.setattr("pipeline.engine.laps.time.perf_counter", lambda: next(times))
    laps = Laps()
    for name in ("weights", "arena", "weights"):
        laps.end(name)
    assert laps.seconds == {"weights": 1.5, "arena": 2.5}


def test_engine_tells_the_parts_of_its_start() -> None:
    engine = Engine(EngineConfig(model=str(MODEL), device="cpu", arena_tokens=1024))
    told = engine.describe()["start_seconds"]
    assert list(told) == ["weights", "patch", "memory plan", "arena", "decode steps"]
    assert told["weights"] > 0
    again = Engine(EngineConfig(model=str(MODEL), device="cpu", arena_tokens=1024), engine._runner)
    assert list(again.describe()["start_seconds"]) == ["memory plan", "arena", "decode steps"]


def test_summary_names_the_longest_parts_of_the_start() -> None:
    start = {"listing": 0.1, "Ray": 3.0, "worker process": 2.0, "imports": 4.0, "tokenizer": 0.2, "weights": 1.0}
    rows = dict(rows_for_table(JobReport("out", 1, {"ok": 1}, stats={"start_seconds": start})))
    assert rows["start"] == (
        "10.3 s until a worker was ready, most of it: imports 4.0, Ray 3.0, worker process 2.0, weights 1.0"
    )
    assert "start" not in dict(rows_for_table(JobReport("out", 1, {"ok": 1})))
