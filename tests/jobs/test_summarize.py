"""The command: one-line errors for users, a dry run, and a real job with the bundled model."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from result_rows import make_row

from jobs import submit
from jobs.cli import this_python
from jobs.summarize import main
from pipeline import read_results
from pipeline.results.rows import NAMES
from pipeline.settings.config import MOST_USED, JobConfig, meaning

ROOT = Path(__file__).parents[2]
QUESTION = "List the key findings in order."
REPORT = ROOT / "examples" / "documents" / "report-01.txt"
# The first finding of that report; its sentences 55 to 110 hold it.
FINDING = "Nobody reviewed the student after the storm, although the forecast had been counted by the circuit."

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]]) -> Run:
    """Runs the command in this process: (exit code, standard output, standard error)."""

    return partial(run_command, main)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    return folder


def bad_input(name: str, tmp_path: Path, model: Path) -> list[object]:
    """Arguments that a user got wrong in one way each."""
    docs, out = tmp_path / "docs", tmp_path / "out"
    good: dict[str, object] = {"--input": docs, "--output": out, "--model": model}
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"id": "x", "body": "t"}\n')
    (tmp_path / "twice.jsonl").write_text('{"id": "x", "text": "t"}\n{"id": "x", "text": "u"}\n')
    for folder, config in {"bad_model": "{", "no_weights": '{"model_type": "qwen3"}'}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
    (tmp_path / "bad.yaml").write_text("input: [")
    (tmp_path / "key.yaml").write_text("max_tokens: 3")
    changes: dict[str, dict[str, object]] = {
        "missing file": {"--input": tmp_path / "nothing.parquet"},
        "empty folder": {"--input": tmp_path / "empty"},
        "wrong column": {"--input": tmp_path / "rows.jsonl"},
        "wrong id column": {"--input": tmp_path / "rows.jsonl", "--text-column": "body", "--id-column": "key"},
        "duplicate ids": {"--input": tmp_path / "twice.jsonl"},
        "no model": {"--model": tmp_path / "nowhere"},
        "not a model": {"--model": docs},
        "unreadable model": {"--model": tmp_path / "bad_model"},
        "no weights": {"--model": tmp_path / "no_weights"},
        "output is a file": {"--output": docs / "a.txt"},
        "output not writable": {"--output": "/proc/stemline"},
        "unknown flag": {"--max-token": 5},
        "a text without quotes": {"--question": "What", "went": "wrong?"},
        "no device": {"--device": "gpu"},
        "flag of vLLM": {"--max-model-len": 8192},
        "not a number": {"--max-new-tokens": "many"},
        "out of range": {"--max-new-tokens": 0},
        "not a choice": {"--preset": "relaese"},
        "bad budget": {"--budget": 1.5},
        "bad block size": {"--block-size": 100},
        "dense with budget": {"--attention": "dense", "--budget": 0.5},
        "bad shard": {"--shard": "3/3"},
        "bad yaml": {"--config": tmp_path / "bad.yaml"},
        "unknown key": {"--config": tmp_path / "key.yaml"},
        "no yaml": {"--config": tmp_path / "none.yaml"},
        "template": {"--chat-template-args": "{"},
        "task": {"--task": "ask"},
    }
    return [item for pair in (good | changes[name]).items() for item in pair]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing file", r"nothing\.parquet: does not exist"),
        ("empty folder", "holds no files; expected .parquet"),
        ("wrong column", "no file or line of the input has it; found: id, body"),
        ("wrong id column", "--id-column key: .*found: id, body"),
        ("duplicate ids", "'x' .*line 1, .*line 2"),
        ("no model", "no such folder"),
        ("not a model", "no config.json there"),
        ("unreadable model", "not valid JSON"),
        ("no weights", r"no \*\.safetensors"),
        ("output is a file", "cannot be written"),
        ("output not writable", "cannot be written"),
        ("unknown flag", "--max-token is not a flag; did you mean '--max-new-tokens'"),
        ("a text without quotes", "went is not a flag, and belongs to none; put a text with spaces between quotes"),
        ("no device", "auto, cpu, cuda, got 'gpu'$"),
        ("flag of vLLM", "--max-model-len is not a flag; it is --max-context here: most tokens"),
        ("not a number", "--max-new-tokens must be a whole number, got 'many'"),
        ("out of range", "--max-new-tokens must be at least 1, got 0"),
        ("not a choice", "--preset must be one of .*did you mean 'release'"),
        ("bad budget", "--budget must be above 0 and at most 1, got 1.5"),
        ("bad block size", "--block-size must be one of 16, 32, 64, 128, 256, got"),
        ("dense with budget", "--budget has no meaning with --attention dense"),
        ("bad shard", "0 <= i < n"),
        ("bad yaml", "not valid YAML"),
        ("unknown key", "'max_tokens' is not a setting; it is max_new_tokens here"),
        ("no yaml", "cannot be read"),
        ("template", "--chat-template-args must be a mapping"),
        ("task", "needs --question"),
    ],
)
def test_what_users_get_wrong_is_one_line(
    name: str, message: str, run: Run, tmp_path: Path, docs: Path, model: Path
) -> None:
    code, out, err = run(*bad_input(name, tmp_path, model))
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert out == ""
    import re

    assert re.search(message, err)


def test_flags_win_over_the_file_and_lists_are_read(tmp_path: Path, docs: Path, model: Path, run: Run) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"input: {docs}\nmodel: {model}\nmax-new-tokens: 5\nkeep_columns: [a, b]\nbudget: 0.25\n")
    code, out, _ = run("--config", job, "--output", tmp_path / "out", "--keep-columns", "c", "--dry-run")
    assert code == 1, "text files have no columns"
    job.write_text(job.read_text().replace("keep_columns: [a, b]\n", ""))
    code, out, err = run("--config", job, "--output", tmp_path / "out", "--max-new-tokens", "7", "--dry-run")
    assert (code, err) == (0, "")
    assert "generated: at most 7 tokens" in out
    assert "density=0.25" in out


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, docs: Path, model: Path, run: Run) -> None:
    (docs / "b.txt").write_text("The draft survey was mapped last winter. " * 12000)
    code, out, _ = run("--input", docs, "--output", tmp_path / "out", "--model", model, "--dry-run")
    assert code == 0
    assert "2 documents" in out
    assert "weights" in out
    assert "too long: documents beyond 40,704 tokens; policy: error" in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_what_of_its_sample_cannot_be_read(tmp_path: Path, docs: Path, model: Path, run: Run) -> None:
    (docs / "latin.txt").write_bytes("größer".encode("cp1252"))
    (docs / "sheet.xlsx").write_bytes(b"x")
    code, out, _ = run("--input", docs, "--output", tmp_path / "out", "--model", model, "--dry-run")
    assert code == 0
    assert "passed over 1 file of another kind, e.g. sheet.xlsx\n" in out
    assert "unreadable: 1 of a sample of 2 documents, e.g. latin.txt: invalid UTF-8 at byte 2" in out


def test_every_setting_has_a_flag_a_key_and_a_meaning(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in JobConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out
        assert len(meaning(name)) > 2


def test_help_begins_with_what_most_people_need(run: Run) -> None:
    _, out, _ = run("--help")
    flags = [line.split()[0].rstrip(",") for line in out.splitlines() if line.startswith("  --")]
    assert flags[0] == "--config"
    assert flags[1:11] == [f"--{name.replace('_', '-')}" for name in MOST_USED]
    assert out.index("what most people need:") < out.index("\n  --input ") < out.index("\ndata:")
    assert out.count("\n  --input ") == 1, "no flag stands there twice"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_bundled_model_finds_the_finding_with_sparse_prefill(tmp_path: Path, model: Path, run: Run) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    sentences = REPORT.read_text().split(".")
    (docs / "report.txt").write_text(".".join(sentences[55:165]) + ".")
    (docs / "empty.txt").write_bytes(b"")
    flags: list[Any] = ["--input", docs, "--output", tmp_path / "out", "--model", model, "--question", QUESTION]
    flags += ["--preset", "sampled", "--block-size", 16, "--budget", 0.3]
    flags += ["--dense-layers", 0, "--dense-below", 0, "--max-new-tokens", 60, "--workers", 1, "--device", "cpu"]
    code, out, _ = run(*flags)
    assert code == 2, "one document is empty"
    assert "1 of 2" in out
    assert "read_results" in out
    found = {row["document_id"]: row for row in read_results(tmp_path / "out").to_pylist()}
    row = found["report.txt"]
    assert FINDING in row["output"]
    assert row["attention"] == "stem"
    assert row["density"] < 0.6
    assert row["finish_reason"] == "stop"
    assert row["prompt_tokens"] > 1000
    assert row["tokenize_seconds"] + row["prefill_seconds"] + row["decode_seconds"] <= row["total_seconds"]
    assert set(NAMES) == set(row)
    code, out, _ = run(*flags)
    assert code == 2
    assert "nothing to do" in out


def test_a_command_of_any_folder_takes_our_kernels_before_others(tmp_path: Path) -> None:
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("def get_kernel(name): ...\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    command = [sys.executable, "-m", "jobs.summarize", "--help"]
    for folder in (tmp_path, ROOT):
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_submitted_jobs_get_absolute_paths(
    tmp_path: Path, docs: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = tmp_path / "job.yaml"
    job.write_text(
        "input: [docs, 's3://bucket/more']\nquestion: --why not?\nchat_template_args: {a: 1}\nworkers: auto\n"
    )
    parser = submit.Parser()
    parser.add_argument("--address")
    parser.add_argument("--no-wait", action="store_true")
    submit.add_job_flags(parser)
    line = ["--config", "job.yaml", "--output", "out", "--model", str(model), "--no-resume", "--keep-columns", "a,b"]
    _, flags = submit.split_arguments(parser, ["--address", "http://x", "--", *line])
    assert str(docs) in flags
    assert "s3://bucket/more" in flags
    assert f"--output={tmp_path / 'out'}" in flags
    again = Parsed.parse(flags)
    assert again["question"] == ["--why not?"]
    assert again["chat_template_args"] == {"a": 1}
    assert again["resume"] is False
    assert "address" not in again


class Parsed:
    """What jobs.summarize makes of a command line."""

    @staticmethod
    def parse(flags: list[str]) -> dict[str, Any]:
        parser = submit.Parser()
        submit.add_job_flags(parser)
        return vars(parser.parse_args(flags))


def test_the_example_in_the_report_reads_the_results(tmp_path: Path) -> None:
    from jobs.summarize import show
    from pipeline.results.rows import result_schema, to_table
    from pipeline.results.store import Store
    from pipeline.results.summary import summarize_results

    rows = [make_row("a", "b", "ok", output="hello " * 30), make_row("c", "d", "error", "no text")]
    pq.write_table(to_table(rows, result_schema()), tmp_path / "part-0.parquet")
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        show(summarize_results(Store(str(tmp_path)), 2))
    command = shown.getvalue().split("read them: ", 1)[1].strip()
    ended = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"a\nsummary\nok\n{'hello ' * 30}\n\nc\nsummary\nerror\nno text\n\n", (
        "whole, one below the other"
    )


def test_the_interpreter_is_named_as_one_types_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a b/.venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.chdir(tmp_path / "a b")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert this_python() == ".venv/bin/python"
    monkeypatch.chdir(tmp_path / "a b/.venv/bin/..")
    assert this_python() == "bin/python"
    monkeypatch.chdir(ROOT)
    assert this_python() == shlex.quote(str(program))
    monkeypatch.setenv("PATH", str(program.parent))
    assert this_python() == "python"
