"""Every command, flag and Python block that a page shows: read by the command's own code, or run.

Commands of ours are run up to the first piece of work, so that flags, values, and what follows from them are checked as
they are written; the cheap ones are run to their end, with the bundled model in place of Qwen/Qwen3-8B and two short
documents in reports/. A command that is in none of the tables below fails the test.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import documented
import pyarrow as pa
import pytest
import torch
from documented import ROOT, Command

from jobs import cli
from jobs.__main__ import commands, show
from pipeline.engine.config import EngineConfig
from pipeline.errors import JobError

SUMMARIZE = ("jobs.summarize", "--input", "reports/", "--output", "results/", "--model", "Qwen/Qwen3-8B")
# Where a command's work begins: all of its flags were read by then, and their values checked.
WORK = {
    "jobs.audit": ("jobs.audit.__main__.run",),
    "jobs.batch": ("pipeline.job.job.run", "pipeline.job.dry_run.describe_plan"),
    "tools.benchmark accumulation": ("tools.benchmark.accumulation.linear_rows",),
    "tools.benchmark attention": ("tools.benchmark.attention._at_length",),
    "tools.benchmark elementwise": ("tools.benchmark.elementwise.torch.cuda.is_available",),
    "tools.benchmark engine": ("tools.benchmark.engine.Run",),
    "tools.benchmark lookup": ("tools.benchmark.lookup.load_tokens",),
    "tools.benchmark schema": ("tools.benchmark.schema.answers",),
    "tools.benchmark scaling": ("tools.benchmark.scaling.prepare",),
    "tools.benchmark selection": ("tools.benchmark.selection.copy_bandwidth",),
    "jobs.demo": ("jobs.demo.__main__.run_arm",),
    "jobs.evaluate": ("jobs.evaluate.run.load_readers", "jobs.evaluate.__main__.read_rows"),
    "tools.evidence": ("tools.evidence.make_case",),
    "tools.faults blows": ("tools.faults.blows.blows",),
    "tools.faults bucket": ("tools.faults.bucket.bucket",),
    "tools.faults determinism": ("pipeline.engine.model.loading.load_runner",),
    "tools.faults flips": ("tools.faults.flips.flips",),
    "tools.faults kills": ("tools.faults.runs.kills",),
    "tools.faults restarts": ("tools.faults.runs.kills",),
    "tools.faults soak": ("tools.faults.runs.soak",),
    "tools.faults table": ("tools.faults.table.table",),
    "jobs.inspect": ("jobs.inspect.__main__.capture",),
    "tools.models": ("tools.models.__main__.checked",),
    "tools.simulate": ("tools.simulate.__main__.measure", "tools.simulate.__main__.run_apart"),
    "tools.shapes": ("tools.shapes.dummy_folder",),
    "jobs.report": ("jobs.report.__main__.load_runs",),
    "jobs.submit": ("jobs.submit.connect",),
    "jobs.summarize": ("pipeline.job.job.run", "pipeline.job.dry_run.describe_plan"),
    "tools.train_demo_model": ("tools.train_demo_model.__main__.train",),
}
# The test, or the script of continuous integration, that runs it to its end; `here` is test_they_run below.
RUN_BY = {
    ".ci/run": ".ci/run: make --no-print-directory lint",
    "jobs": "tests/test_commands.py: test_the_list_of_commands_names_each",
    "jobs.audit": "tests/jobs/test_audit.py: test_rows_figures_and_page_of_an_audit",
    "jobs.batch": "tests/jobs/test_batch.py: test_a_batch_is_answered_and_resumed",
    "tools": "tests/test_commands.py: test_the_list_of_commands_names_each",
    "tools.benchmark accumulation": "tests/tools/test_benchmark_accumulation.py: test_sums_and_logits_are_measured",
    "tools.benchmark attention": "tests/tools/test_benchmark_attention.py: test_every_case_of_ours",
    "tools.benchmark elementwise": "tests/tools/test_benchmark_elementwise.py: test_every_case_passes_its_check",
    "tools.benchmark engine": "tests/tools/test_benchmark_engine.py: test_every_precision_has_its_arms_and_its_errors",
    "tools.benchmark lookup": "tests/tools/test_benchmark_lookup.py: test_both_settings_are_measured",
    "tools.benchmark schema": "tests/tools/test_benchmark_schema.py: test_answers_and_steps_are_measured",
    "tools.benchmark scaling": "tests/tools/test_benchmark_scaling.py: test_real_jobs_of_one_and_two_workers",
    "tools.benchmark selection": "tests/tools/test_benchmark_selection.py: def test_",
    "jobs.demo": "tests/quality/test_findings.py: test_demo_settings_keep_the_findings",
    "tools.demo_documents": "tests/tools/test_demo_documents.py: test_committed_documents_are",
    "tools.docs": "tests/tools/test_docs.py: test_the_command_writes_what_is_missing_or_differs",
    "tools.evidence": "tests/tools/test_evidence_tool.py: test_the_command_prints_a_table",
    "tools.models": "tests/tools/test_models.py: test_types_that_are_named_are_checked_alone",
    "jobs.evaluate": "tests/jobs/test_evaluate.py: test_job_writes_rows_and_report",
    "tools.faults blows": "tests/faults/test_blows.py: test_ray_and_workers_are_killed_in_turn",
    "tools.faults bucket": "tests/faults/test_bucket.py: test_a_job_from_and_to_a_bucket_is_killed_and_resumed",
    "tools.faults determinism": "tests/faults/test_table.py: test_shares_of_a_real_engine",
    "tools.faults flips": "tests/faults/test_flips.py: test_no_flipped_bit_is_silent",
    "tools.faults kills": "tests/faults/test_driver.py: test_a_driver_killed_at_a_random_moment",
    "tools.faults restarts": "tests/faults/test_driver.py: test_a_driver_killed_at_a_random_moment",
    "tools.faults soak": "tests/faults/test_driver.py: test_a_driver_killed_at_a_random_moment",
    "tools.faults table": "tests/faults/test_table.py: test_a_fault_is_tried_on_a_real_job",
    "jobs.inspect": "tests/jobs/test_inspect.py: test_the_page_in_a_browser",
    "jobs.report": "here",
    "tools.shapes": "tests/tools/test_shapes.py: test_the_command_writes_a_config",
    "tools.simulate": "tests/tools/test_simulate.py: test_the_command",
    "jobs.submit": "tests/jobs/test_submit.py: test_both_ways_of_submitting",
    "jobs.summarize": "here",
    "tools.train_demo_model": "tests/tools/test_train_demo_model.py: test_training_lowers_the_loss",
    "make compare": "tests/quality/test_findings.py: test_demo_settings_keep_the_findings",
    "make demo": "tests/quality/test_findings.py: test_demo_settings_keep_the_findings",
    "make demo-real": "tests/jobs/test_demo.py: test_the_demo_of_real_models_is_planned",
    "make docs-site": "tests/test_docs_pages.py: test_the_site_builds_without_a_warning",
    "make lint": ".ci/run: make --no-print-directory lint",
    "make test": ".ci/run: make --no-print-directory test",
    "prometheus": "tests/pipeline/test_prometheus.py: test_all_panels_show_a_running_job",
    "pytest": ".ci/run: make --no-print-directory test",
    "python examples/store_fp8.py": "tests/test_examples.py: def test_store_fp8",
    "stemline": "tests/test_commands.py: test_the_script_runs_commands",
    "ray job": "tests/jobs/test_submit.py: test_both_ways_of_submitting",
    "ray start": "tests/jobs/test_submit.py: def cluster",
    "ray status": "tests/jobs/test_submit.py: def cluster",
}
# What cannot run here: other machines, or this environment's own making.
ELSEWHERE = {
    "docker": "an engine for containers", "kubectl": "a Kubernetes cluster", "ssh": "another machine",
    "pip": "the Makefile makes the environment", "venv": "the Makefile makes the environment",
}  # fmt: skip
# Words of the text that are no commands.
NAMES = {("make",), ("python",), ("ray",), ("git",), ("tools.benchmark", "...")}  # git is a model type, too
EARLIER_FLAGS = {("--dtype",)}  # told under "Upgrading"
RAY_FLAGS = {("--working-dir", ".")}

COMMANDS = list({command.words: command for command in documented.commands()}.values())
OURS = [command for command in COMMANDS if command.words[0].startswith(("jobs.", "tools.")) and command.complete]


class WorkBeginsError(Exception):
    """The work begins."""


class ParsingError(Exception):
    """Carries a command's parser, as it is about to read the command line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as a reader's checkout, with two short documents in reports/."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "models", "constraints.txt", "tests", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "reports").mkdir()
    text = (ROOT / "examples/documents/report-01.txt").read_text(encoding="utf-8")
    for number in range(2):
        told = "\n\nKey finding: The mill lost 14 pallets to damp in June.\n"
        (folder / f"reports/{number}.txt").write_text(text[1000 * number :][:900] + told, encoding="utf-8")
    body = {"messages": [{"role": "user", "content": "What went wrong in June?"}]}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "batch.jsonl").write_text(json.dumps(request) + "\n", encoding="utf-8")
    (job,) = [page for page in documented.PAGES if page.name == "configuration.md"]
    yaml = job.read_text(encoding="utf-8").split("```yaml\n", 1)[1].split("```", 1)[0]
    (folder / "job.yaml").write_text(yaml, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def stood_in(words: Sequence[str]) -> list[str]:
    """Arguments with what is here for what a reader has."""
    model = str(ROOT / "models/tiny-reader")
    here = {"Qwen/Qwen3-8B": model, "/models/Qwen3-8B": model, "PATH": model, "FOLDER": "trained"}
    here["shapes/llama-3.1-8b"] = model
    here["Qwen/Qwen2.5-Coder-1.5B-Instruct"] = here["Qwen/Qwen2.5-0.5B-Instruct"] = model
    here["/data/batch.jsonl"], here["/data/results"] = "batch.jsonl", "results-of-cluster"
    here["TEXT.txt"] = str(ROOT / "examples/documents/report-01.txt")
    return [here.get(word, word) for word in words]


def key_of(words: Sequence[str], table: dict[str, Any]) -> str:
    """The entry of a table that a command belongs to; a failure says what to do."""
    for length in (2, 1):
        if (key := " ".join(words[:length])) in table:
            return key
    raise AssertionError(f"{' '.join(words)}: nothing here says how it is tested; see the tables of {__file__}")


def main_of(module: str) -> Callable[[Sequence[str]], int]:
    package = importlib.util.find_spec(module)
    assert package, module
    inner = f"{module}.__main__" if package.submodule_search_locations else module
    return importlib.import_module(inner).main


def begin(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of ours up to its work. A GPU that is not here is the CPU."""
    module, *arguments = words
    work = WORK[key_of(words, WORK)]

    def reached(*args: Any, **kwargs: Any) -> None:
        raise WorkBeginsError

    for name in work:
        monkeypatch.setattr(name, reached)
    monkeypatch.setattr(EngineConfig, "torch_device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(EngineConfig, "torch_devices", lambda self: (torch.device("cpu"),) * self.gpus)
    for benchmark in ("accumulation", "attention", "selection"):
        monkeypatch.setattr(f"tools.benchmark.{benchmark}.DEVICE", "cpu")
    with pytest.raises(WorkBeginsError):
        main_of(module)(stood_in(arguments))


def test_pages_are_found() -> None:
    pages = {command.page for command in COMMANDS}
    assert {"README.md", "docs/operations.md", "docs/speed.md", "docs/quality.md", "CONTRIBUTING.md"} <= pages
    assert len(OURS) > 15
    assert SUMMARIZE in {command.words for command in COMMANDS}
    assert documented.languages() <= {"", "sh", "python", "yaml"}, "commands may hide in blocks of other kinds"


def test_something_runs_each() -> None:
    for command in COMMANDS:
        if command.words[0] in ELSEWHERE:
            files = [word for word in command.words if word.endswith((".yaml", ".txt"))]
            assert all((ROOT / file).is_file() for file in files), command
        elif command.words not in NAMES:
            key_of(command.words, RUN_BY)
    for told in RUN_BY.values():
        file, words = told.split(": ") if told != "here" else (Path(__file__), "def test_they_run(")
        assert words in (ROOT / file).read_text(encoding="utf-8"), told


@pytest.mark.parametrize("command", [item for item in OURS if item.words[0] != "jobs.report"], ids=str)
def test_it_begins(command: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(command.words, monkeypatch)


@pytest.mark.parametrize("command", [item for item in COMMANDS if item.words[0] == "make"], ids=str)
def test_targets_exist_and_what_they_run_begins(command: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        words = line.split()
        if "jobs." in line:
            assert words[:2] == [".venv/bin/python", "-m"]
            begin(words[2:], monkeypatch)


@pytest.mark.parametrize("command", [item for item in COMMANDS if item.words[0] == "ray"], ids=str)
def test_ray_takes_it(command: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own command line reads it; the job's command in it begins."""
    import click
    from ray.scripts.scripts import cli

    found: click.Command = cli
    context = click.Context(cli, info_name="ray")
    words = list(command.words[1:])
    while words and isinstance(found, click.Group):
        name = words.pop(0)
        inner = found.get_command(context, name)
        assert inner, f"ray has no command {name}"
        found, context = inner, click.Context(inner, info_name=name, parent=context)
    if not words or words == ["--working-dir", "."]:
        return  # a name, or a part
    assert context.parent
    read = found.make_context(found.name, words, parent=context.parent)
    entrypoint = list(read.params.get("entrypoint", ()))
    if entrypoint:
        assert entrypoint[:2] == ["python", "-m"]
        begin(entrypoint[2:], monkeypatch)


@cache
def parsers() -> list[argparse.ArgumentParser]:
    """The parser of every command of ours, and those of its subcommands, with nothing required."""
    found: list[argparse.ArgumentParser] = []

    def caught(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise ParsingError(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        for key in (*WORK, "jobs.report"):
            module, *rest = key.split()
            with pytest.raises(ParsingError) as caught_at:
                main_of(module)(rest)
            found.append(caught_at.value.parser)
    for parser in [*found]:
        for action in parser._actions:
            action.required = False
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
    return found


def taken(parser: argparse.ArgumentParser, words: Sequence[str]) -> bool:
    """Whether a parser takes these flags; one flag alone may lack its value."""
    if len(words) == 1 and words[0] in parser._option_string_actions:
        return True
    try:
        parser.parse_args([*words])
    except (JobError, SystemExit):
        return False
    return True


def test_flags_in_the_text_are_taken_with_their_values() -> None:
    spans = [span for span in documented.flags() if span.words not in EARLIER_FLAGS | RAY_FLAGS]
    assert len(spans) > 20
    assert not [str(span) for span in spans if not any(taken(parser, span.words) for parser in parsers())]


def test_commands_that_the_text_names_exist() -> None:
    for command in COMMANDS:
        if not command.words[0].startswith(("jobs.", "tools.")) or command.complete:
            continue
        module, *rest = command.words
        assert main_of(module)
        flags = [word for word in rest if word != "..."]
        own = [parser for parser in parsers() if parser.prog.startswith(f"python -m {module}")]
        assert not flags or " ".join(command.words) in WORK or any(taken(parser, flags) for parser in own), command


class Rows:
    """A dataset for the example of map_batches: its arguments go through Ray's own signature, its rows to the stage."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []

    def map_batches(self, *given: Any, **settings: Any) -> None:
        import ray

        inspect.signature(ray.data.Dataset.map_batches).bind(None, *given, **settings)
        stage = given[0](**settings["fn_constructor_kwargs"], max_new_tokens=4)
        self.tables.append(stage(pa.table({"text": ["a text"], "year": [1730]})))
        stage.close()
        assert self.tables[-1]["year"].to_pylist() == [1730]


def run_block(block: documented.Block) -> None:
    """Run a Python block; what it reads or makes must hold rows."""
    import ray

    import pipeline

    dataset = Rows()
    names: dict[str, Any] = {"dataset": dataset, "ray": ray, "StemlineStage": pipeline.StemlineStage}
    code = block.code.replace('"Qwen/Qwen3-8B"', repr(str(ROOT / "models/tiny-reader")))
    exec(compile(code, f"{block.page}, Python block {block.number}", "exec"), names)
    made = [*dataset.tables, *(value for name, value in names.items() if name in ("rows", "frame", "table"))]
    assert made, f"{block}: what is it to show?"
    assert all(len(one) for one in made)


@pytest.mark.usefixtures("ray_here")
def test_they_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first commands of the README, what looks at their results, and all Python blocks."""
    import pipeline

    line = [*stood_in(SUMMARIZE[1:]), "--workers", "1", "--max-new-tokens", "8"]
    assert main_of(SUMMARIZE[0])(line) == 0
    assert "2 of 2" in capsys.readouterr().out
    (bundled,) = [command for command in OURS if command.words[:1] == SUMMARIZE[:1] and "findings/" in command.words]
    assert main_of(SUMMARIZE[0])(bundled.words[1:]) == 0, "the README's command for the bundled model, as it stands"
    found = pipeline.read_results("findings/").to_pylist()
    assert [row["output"] for row in found] == ["1. The mill lost 14 pallets to damp in June."] * 2
    for copy in ("answers", "dense", "shard-0", "shard-1"):
        shutil.copytree(place / "results", place / copy)
    reports = [command for command in OURS if command.words[0] == "jobs.report"]
    assert len(reports) > 2
    for command in reports:
        words = [word.replace("/data/results", "results/") for word in command.words[1:]]
        assert main_of("jobs.report")(words) == 0
        shown = capsys.readouterr().out
        assert "written" in shown or "Results: " in shown or "Stemline comparison" in shown, command
    assert (place / "results/report.html").stat().st_size > 1 << 20
    for block in documented.blocks():
        run_block(block)
    assert main_of(SUMMARIZE[0])(line) == 0
    assert "nothing to do" in capsys.readouterr().out, "the same command again continues, says the README"


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def stemline(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The console script, as installing makes it; `code` runs at its end."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["stemline"]
    module, _, function = entry.partition(":")
    program = f"import atexit, sys\natexit.register(lambda: exec({code!r}))\n"
    program += "sys.argv = ['/opt/bin/stemline', *sys.argv[1:]]\n"
    return python("-c", f"{program}from {module} import {function}\n{function}()", *words)


def test_the_script_runs_commands(tmp_path: Path) -> None:
    for words in ([], ["--help"], ["-h"]):
        listed = stemline(*words)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert listed.stdout.startswith("usage: stemline COMMAND [flags]; --help")
        assert all(f"  {name} " in listed.stdout and about in listed.stdout for name, about in commands().items())
    assert stemline("--version").stdout == f"stemline {metadata.version('stemline')}\n"
    shown = stemline("summarize", "--help")
    assert shown.stdout.startswith("usage: stemline summarize --input DOCS --output OUT --model PATH_OR_ID [flags]\n")
    wrong = stemline("summarize", "--input", "a", "--output", str(tmp_path / "out"), "--model", "m", "--presett", "x")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: --presett is not a flag; did you mean '--preset'?\n"
    module = python("-m", "jobs", "report")
    assert (module.returncode, module.stderr) == (1, "error: the following arguments are required: OUTPUT_DIR\n")


def test_an_unknown_command_is_told_with_the_nearest() -> None:
    ended = stemline("sumarize", "--input", "a")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: sumarize is not a command; did you mean 'summarize'?\n"
    assert stemline("xyzzy").stderr == "error: xyzzy is not a command; see --help\n"
    assert stemline("cli").stderr.startswith("error: cli is not a command"), "a module that is no command"


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["summarize", "--help"], ["sumarize"]], ids=str)
def test_the_script_says_what_it_is_without_what_runs_models(words: list[str]) -> None:
    code = "import sys; print('heavy', sorted({'torch', 'ray', 'transformers', 'plotly'} & set(sys.modules)))"
    assert stemline(*words, code=code).stdout.endswith("heavy []\n")


def test_commands_are_told_as_they_are_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / ".venv/bin/stemline"
    script.parent.mkdir(parents=True)
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setattr("sys.argv", [".venv/bin/stemline", "summarize"])
    assert cli.command("report") == ".venv/bin/stemline report"
    monkeypatch.setattr("sys.argv", [str(script), "summarize"])
    monkeypatch.setenv("PATH", str(script.parent))
    assert cli.command("report") == "stemline report"
    monkeypatch.setattr("sys.argv", ["jobs/summarize.py"])
    assert cli.command("report").endswith(" -m jobs.report")


def test_the_list_of_commands_names_each(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("jobs", "tools"):
        listed = commands(ROOT / package)
        of_pages = {tuple(command.words[0].split(".")) for command in OURS}
        assert {name for folder, name in of_pages if folder == package} <= set(listed)
        assert all(about and "python -m" not in about and "command line of" not in about for about in listed.values())
        show(ROOT / package)
        shown = capsys.readouterr().out
        assert f"python -m {package}.COMMAND" in shown
        assert all(f"{name} " in shown and about in shown for name, about in listed.items())
    assert list(commands())[:2] == ["summarize", "submit"]


@pytest.mark.parametrize("preferred", [True, False])
def test_the_script_finds_our_kernels_beside_another_package_of_that_name(tmp_path: Path, preferred: bool) -> None:
    """As a console script does, the program starts without the checkout on its path, which comes behind."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    program = f"""
import os, sys
sys.path[:1] = [{str(tmp_path)!r}]
sys.path.append({str(ROOT)!r})
from pipeline.imports import check_kernels, prefer_ours
if {preferred}:
    prefer_ours()
check_kernels()
import kernels.dispatch
print(kernels.__file__, os.environ.get("PYTHONPATH"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    if preferred:
        assert run.stdout.split() == [str(ROOT / "kernels/__init__.py"), str(ROOT)], run.stderr
    else:
        assert "WrongPackageError" in run.stderr
