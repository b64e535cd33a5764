"""Settings, manifest and progress: what counts as the same job, and what people are told."""

from __future__ import annotations

import ast
import inspect
import io
import pickle
import re
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from result_rows import make_row

import pipeline.settings.config
from pipeline import Summarizer
from pipeline.engine.config import EngineConfig
from pipeline.errors import JobError
from pipeline.job import manifest
from pipeline.job.configs import make_engine_config
from pipeline.job.progress import Progress
from pipeline.location import open_filesystem, safe_name
from pipeline.prompts.task import make_task
from pipeline.results.parts import compact, done_rows, part_names, read_results, recover
from pipeline.results.rows import Outcome, result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig, flag, from_mapping, instead
from pipeline.settings.shared import EngineSettings, Sampling
from pipeline.settings.vllm import NOT_HERE, OURS
from pipeline.source import DocumentReader, find_files, list_documents
from stem_core.config import StemConfig
from stem_core.settings import SettingError, values_of


def config(**settings: Any) -> JobConfig:
    return JobConfig(**({"input": ("docs",), "output": "out", "model": "models/tiny-reader"} | settings))


def test_only_settings_that_can_change_an_output_are_fingerprinted() -> None:
    same = [
        {"workers": 3},
        {"deadline": 5},
        {"flush_documents": 1},
        {"device": "cpu"},
        {"output": "x"},
        {"max_live": 2},
        {"max_output_error": 0},
        {"evidence": "off"},
    ]
    other = [{"max_new_tokens": 9}, {"seed": 1}, {"budget": 0.3}, {"attention": "dense"}, {"too_long": "truncate"}]
    other += [{"preset": "release"}, {"precision": "fp16"}, {"block_size": 64}, {"temperature": 0.5}]
    other += [{"max_output_error": 0.5}, {"top_k": 20}, {"min_p": 0.1}, {"thinking": "on"}]
    other += [{"repetition_penalty": 1.2}, {"stop": ["x"]}]
    assert {config(**changes).fingerprint() for changes in same} == {config().fingerprint()}
    prints = {config(**changes).fingerprint() for changes in other}
    assert len(prints | {config().fingerprint()}) == len(other) + 1


def test_a_preset_that_is_no_more_names_another() -> None:
    with pytest.raises(JobError, match=r"^--preset robust is no more: .*; use 'sampled', the default$"):
        config(preset="robust")


def test_the_model_counts_by_its_files_not_by_its_path(tmp_path: Path, model: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"x" * (10 << 20))
    before = manifest.model_fingerprint(str(tmp_path), None)
    assert config(model=str(tmp_path)).fingerprint() == config().fingerprint()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(5)
        file.write(b"y")
    assert manifest.model_fingerprint(str(tmp_path), None) != before


def test_input_counts_by_content_and_by_how_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    model = {"model": str(Path(__file__).parents[2] / "models" / "tiny-reader")}

    def prints(**settings: Any) -> dict[str, str]:
        return manifest.fingerprints(config(**model, **settings), find_files((str(tmp_path),))[0])

    before = prints()
    path.touch()
    assert prints() == before
    for settings in ({"text_column": "body"}, {"shard": "0/2"}, {"keep_columns": ("a",)}, {"id_column": "x"}):
        assert {name for name, value in prints(**settings).items() if value != before[name]} == {"reading"}
    path.write_text("two")
    assert {name for name, value in prints().items() if value != before[name]} == {"input"}


def test_credentials_stay_out_of_names_and_manifest(tmp_path: Path) -> None:
    location = "s3://key:secret@bucket/docs?endpoint_override=host"
    assert safe_name(location) == "s3://bucket/docs"
    store = Store(str(tmp_path))
    manifest.save(store, config(input=(location,)), {"config": "x"})
    assert "secret" not in (tmp_path / manifest.NAME).read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": "some"}, "--workers must be a whole number or auto"),
        ({"workers": True}, "--workers must be a whole number or auto"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"keep_columns": 5}, "--keep-columns must be one name or a list"),
        ({"resume": "yes"}, "--resume must be true or false"),
        ({"input": ()}, "--input is missing"),
        ({"top_p": 0}, "--top-p must be above 0"),
        ({"top_k": 0}, "--top-k must be at least 1, got 0"),
        ({"shard": "1/x"}, "--shard must be i/n"),
        ({"decay": 0}, "--decay must be above 0 and at most 1, got 0$"),
        ({"dense_layers": -1}, "--dense-layers must be in 0.."),
        ({"stride": 24}, "--stride must be a divisor of block_size=128, got 24"),
        ({"max_live": 1025}, "--max-live must be in 1..1,024, got 1025"),
        ({"seed": 2**60}, "--seed must be a number of at most 9,007,199,254,740,992"),
        ({"model": Path("a\0b")}, "--model must be text without NUL"),
        ({"load_format": "dumy"}, "--load-format must be one of auto, dummy, got 'dumy'; did you mean 'dummy'"),
        ({"text_column": {"https://u:secret@host/": 1}}, "^(?!.*secret).*--text-column must be text"),
        ({"prompt_date": "tomorrow"}, "--prompt-date must be a date like 2026-11-28, got 'tomorrow'"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        config(**settings)


# Of another value than its default, each setting that a worker's engine and its sampling get from the job.
HANDED_ON = {
    "model": "some/model", "revision": "main", "trust_remote_code": True, "precision": "bf16", "chunk_tokens": 64,
    "max_live": 3, "max_context": 500, "arena_tokens": 900, "load_format": "dummy", "temperature": 0.5, "top_p": 0.9,
    "top_k": 20, "min_p": 0.1, "seed": 4, "adapter": "/an/adapter", "rope_scaling": 2.0, "prompt_lookup": "off",
    "repetition_penalty": 1.2,
}  # fmt: skip


def test_names_of_vllm_lead_to_ours() -> None:
    ours = {item.name for item in fields(JobConfig)}
    assert set(OURS.values()) <= ours
    assert not ours & (set(OURS) | set(NOT_HERE))
    assert not set(OURS) & set(NOT_HERE)
    with pytest.raises(JobError, match="'max_model_len' is not a setting; it is max_context here: most tokens of pro"):
        from_mapping({"max_model_len": 8192}, "run_job()")
    flags = {flag(name) for name in ours}
    for theirs in ("--tensor-parallel-size", "-tp"):
        assert instead(theirs, flags, flag).startswith("; it is --gpus-per-worker here: GPUs of one node")
    assert instead("--no-enable-prefix-caching", flags, flag).startswith("; questions to one document always share")
    assert instead("--quantization", {"--question"}, flag) == "; did you mean '--question'?", (
        "a command without jobs' flags"
    )
    assert instead("--enforce-eager", flags, flag) == "; this is chosen without a setting"
    said = {name for why in NOT_HERE.values() for name in re.findall(r"--[a-z-]+", why)}
    assert said <= flags


def test_what_engine_and_sampling_share_with_the_job_is_declared_once_and_handed_on() -> None:
    shared = {item.name for item in (*fields(EngineSettings), *fields(Sampling))}
    assert shared == set(HANDED_ON), "a new one needs a value here"
    tree = ast.parse(inspect.getsource(pipeline.settings.config))
    (job,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    own = {node.target.id for node in job.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert "output" in own
    assert not own & (shared | {item.name for item in fields(StemConfig)})
    job_config = config(**HANDED_ON)
    engine = make_engine_config(job_config, "cpu")
    assert (
        values_of(engine, EngineSettings) | values_of(Sampling(**values_of(job_config, Sampling)), Sampling)
        == HANDED_ON
    )
    assert all(HANDED_ON[item.name] != item.default for item in fields(JobConfig) if item.name in shared)


def test_every_field_of_stem_is_a_setting_that_overrides_the_preset() -> None:
    for item in fields(StemConfig):
        if item.name not in ("schedule", "density", "estimator", "block_size"):
            value = getattr(StemConfig.preset("sampled"), item.name)
            changed = (value / 2 or 0.5) if isinstance(value, float) else value // 2 + 8 * (value < 8)
            stem = config(**{item.name: changed}).stem()
            assert stem is not None
            assert getattr(stem, item.name) == changed != value


def test_a_wrong_setting_survives_the_way_between_processes() -> None:
    with pytest.raises(SettingError) as caught:
        EngineConfig("m", precision="bf61")
    told = "precision must be one of auto, bf16, fp16, fp32, fp8, got 'bf61'; did you mean 'bf16'?"
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value))) == told


def test_the_date_of_prompts_is_a_setting() -> None:
    """For workers that start on other days without a manifest: Ray Data's, or those of several outputs."""
    assert config().today() == date.today()
    dated = config(prompt_date=date(2024, 7, 6))
    assert (dated.prompt_date, dated.today()) == ("2024-07-06", date(2024, 7, 6))
    assert dated.fingerprint() != config().fingerprint()
    assert "prompt_date" not in config().output_settings(), "jobs that are older than the setting go on"
    with Summarizer(model="models/tiny-reader", prompt_date="2024-07-06") as summarizer:
        assert summarizer._worker_config.today == dated.today()


def test_the_task_counts_by_question_and_template(tmp_path: Path) -> None:
    path = tmp_path / "p.jinja"
    path.write_text("{{ document }}")
    tasks = [
        make_task("summarize", None, None),
        make_task("summarize", "Why?", None),
        make_task("ask", "Why?", str(path)),
    ]
    assert len({task.fingerprint() for task in tasks}) == 3


def test_the_result_schema_is_documented() -> None:
    for field in result_schema():
        assert field.metadata
        assert len(field.metadata[b"meaning"]) > 2
        assert field.metadata[b"origin"]
        assert (b"null_when" in field.metadata) == field.nullable
    with pytest.raises(ValueError, match="got 'fine'"):
        Outcome(status="fine")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_tells_tokens_rate_failures_and_time_left() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(4, 1000, stream=stream, clock=lambda: now[0])
    progress.add([make_row("bad", "x", "error")], 200)
    progress.start_clock()
    progress.workers(1, 0, 1)
    now[0] = 10.0
    progress.add(
        [make_row("a", "x", "ok", prompt_tokens=90, output_tokens=10, prefill_seconds=4.0, decode_seconds=6.0)], 200
    )
    # 600 bytes are to be read, at 4 seconds for 200, and two outputs to be written, at 6 seconds for one.
    assert progress.line() == "2/4 documents · 100 tokens · 10 tokens/s · 1 failed · about 0:24 left"
    progress.tick()
    assert stream.getvalue() == "", "a log gets a line every half minute, not every row"
    now[0] = 31.0
    progress.tick()
    progress.tick()
    assert stream.getvalue().count("\n") == 1
    terminal = Terminal()
    live = Progress(1, 10, stream=terminal, clock=lambda: now[0])
    for _ in range(5):
        now[0] += 1
        live.tick()
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().count("\r") == 5


def test_an_object_store_holds_documents_and_results() -> None:
    place = "mock:///bucket/docs"
    files = open_filesystem(place)
    files.create_dir("bucket/docs/sub", recursive=True)
    for name, text in {"a.txt": "first", "sub/b.jsonl": '{"id": "b", "text": "second"}\n'}.items():
        with files.open_output_stream(f"bucket/docs/{name}") as stream:
            stream.write(text.encode())
    catalogue = list_documents(find_files((place,))[0])
    reader = DocumentReader("text", [])
    assert {d.document_id: reader.read(d)[0] for d in catalogue.documents()} == {"a.txt": "first", "b": "second"}
    assert catalogue.document(0).source == "mock:///bucket/docs/a.txt"

    store = Store("mock:///bucket/out")
    store.create()
    sink = Sink(store, result_schema(), flush_documents=1, flush_seconds=1)
    for name in "abc":
        sink.add(make_row(name, "x", "ok"))
    assert len(part_names(store)) == 3
    assert compact(store) == 1
    assert recover(store) == []
    assert sorted(done_rows(store)["document_id"].to_pylist()) == ["a", "b", "c"]
    assert read_results("mock:///bucket/out").num_rows == 3
    with store.filesystem.open_input_file(store.path(part_names(store)[0])) as file:
        assert pq.read_table(file).num_rows == 3


@pytest.mark.parametrize(("value", "taken"), [("on", "on"), ("off", "off"), (True, "on"), (False, "off")])
def test_evidence_may_be_a_bare_on_or_off_of_yaml(value: Any, taken: str) -> None:
    assert config(evidence=value).evidence == taken


@pytest.mark.parametrize("value", ["maybe", 1, None])
def test_evidence_is_on_or_off(value: Any) -> None:
    with pytest.raises(JobError, match="--evidence must be"):
        config(evidence=value)
