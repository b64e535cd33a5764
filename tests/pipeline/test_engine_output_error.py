"""max_output_error: sparse prefill whose attention output is off by too much is done again, densely."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from engine_models import TINY_READER, prompts, run, save_model
from placed import Devices, chips
from test_engine_fp8 import report
from test_engine_stages import spread

from pipeline import read_results
from pipeline.engine import Completion, Engine, EngineConfig, Request
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.readings import ProbeReadings
from pipeline.errors import JobError
from pipeline.job.job import run_job
from pipeline.results.rows import EngineFields
from stem_core import StemConfig
from stem_core.output_error import ErrorProbe

NEW = 8
ANY = 100.0  # a limit that only measures
STEM = StemConfig(
    schedule="density", density=0.4, block_size=32, stride=8, sink_blocks=1, local_blocks=2, dense_layers=1
)
LENGTHS = [900, 700, 1000, 90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama", head_dim=32)


def make(folder: Path, attention: StemConfig | None, **options: Any) -> Engine:
    defaults = {"device": "cpu", "chunk_tokens": 128, "arena_tokens": 4096}
    return Engine(EngineConfig(str(folder), attention=attention, **(defaults | options)))


def completions(engine: Engine, texts: list[np.ndarray], new: int = NEW) -> list[Completion]:
    done = run(engine, [Request(str(i), prompt, new) for i, prompt in enumerate(texts)])
    assert {completion.status for completion in done.values()} == {"ok"}, done
    return [done[str(i)] for i in range(len(texts))]


def errors(engine: Engine, texts: list[np.ndarray]) -> list[float]:
    """Each document's."""
    found = [completion.output_error for completion in completions(engine, texts)]
    assert all(error is not None and 0 < error < ANY for error in found), found
    return [error for error in found if error is not None]


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_only_what_goes_beyond_becomes_dense(folder: Path, estimator: str, precision: str) -> None:
    sparse, texts = STEM.replace(estimator=estimator, density=0.2), prompts(LENGTHS)[:3]
    plain = completions(make(folder, sparse, precision=precision), texts)
    dense = completions(make(folder, None, precision=precision), texts)
    found = errors(make(folder, sparse.replace(max_output_error=ANY), precision=precision), texts)
    worst = found.index(max(found))
    limit = (max(found) + sorted(found)[1]) / 2
    done = completions(make(folder, sparse.replace(max_output_error=limit), precision=precision), texts)
    for i, completion in enumerate(done):
        assert plain[i].output_error is None
        assert plain[i].token_ids != dense[i].token_ids, "sparse prefill must show, or this test shows nothing"
        if i != worst:
            assert completion.token_ids == plain[i].token_ids
            assert (completion.attention, completion.attention_reason) == ("stem", "")
            assert completion.density_by_layer == plain[i].density_by_layer
            assert completion.output_error == found[i]
            continue
        assert completion.token_ids == dense[i].token_ids
        assert completion.attention == "dense"
        assert completion.attention_reason.startswith(
            f"sparse prefill's attention output is off by {found[i]:.4f} (tokens "
        )
        assert completion.attention_reason.endswith(f"--max-output-error allows {limit}")
        assert (completion.density, completion.density_by_layer) == (1.0, (1.0, 1.0, 1.0))
        assert completion.kernel == dense[i].kernel
        assert completion.output_error is not None
        assert completion.output_error > limit


def test_a_document_does_not_depend_on_its_neighbours(folder: Path) -> None:
    texts = prompts(LENGTHS)
    limit = sorted(errors(make(folder, STEM.replace(max_output_error=ANY)), texts[:3]))[1] - 1e-6
    config = STEM.replace(max_output_error=limit)
    together = completions(make(folder, config), texts)
    assert {completion.attention for completion in together} == {"stem", "dense"}
    for text, completion in zip(texts, together, strict=True):
        alone = completions(make(folder, config), [text])[0]
        for name in ("token_ids", "attention", "attention_reason", "density", "output_error"):
            assert getattr(alone, name) == getattr(completion, name)


@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_neither_error_nor_decision_depend_on_chunks(
    folder: Path, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer ends early in all chunks but the last, and is measured all the same."""
    (text,) = prompts([1000])
    config = STEM.replace(estimator=estimator, max_output_error=ANY)
    sizes, read, seen = (32, 96, 512, 1024), ProbeReadings.read, []

    def spy(readings: ProbeReadings, newest: int) -> Iterator[tuple[int, float]]:
        for index, error in read(readings, newest):
            seen.append(error)
            yield index, error

    monkeypatch.setattr(ProbeReadings, "read", spy)
    found = [completions(make(folder, config, chunk_tokens=size), [text])[0] for size in sizes]
    blocks = len(seen) // 4
    assert blocks == 4
    assert seen == pytest.approx(seen[-blocks:] * 4, abs=1e-5)
    worst = found[-1].output_error
    assert worst == max(seen[-blocks:])
    config = config.replace(max_output_error=worst - 1e-3)
    again = [completions(make(folder, config, chunk_tokens=size), [text])[0] for size in sizes]
    assert {completion.attention for completion in again} == {"dense"}
    assert len({completion.attention_reason for completion in again}) == 1
    assert len({tuple(completion.token_ids) for completion in again}) == 1


def test_it_begins_again_as_soon_as_a_chunk_is_known_to_go_beyond(folder: Path) -> None:
    options = {"chunk_tokens": 256, "prompt_lookup": "off"}
    engine, begun = make(folder, STEM.replace(density=0.2, max_output_error=1e-6), **options), []
    logits = engine._runner.logits

    def spy(ids: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
        if positions.shape[1] > 1:
            begun.append(int(positions[0, 0]))
        return logits(ids, positions, *args)

    engine._runner.logits = spy  # type: ignore[method-assign]
    (done,) = completions(engine, prompts([1000]))
    # The first sampled block lies in the second chunk, whose error is read when the third has been launched.
    assert begun == [0, 256, 512, 0, 256, 512, 768]
    assert "(tokens 320 to 351)" in done.attention_reason
    begun.clear()
    completions(engine, prompts([200]))
    assert begun == [0, 0], "one chunk alone is read at its end"


def test_prefill_seconds_are_those_of_both_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = make(folder, STEM.replace(max_output_error=1e-6), chunk_tokens=1024), [1.0]
    logits = engine._runner.logits

    def slow(ids: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
        now[0] += 5.0 if positions.shape[1] > 1 else 0.0
        return logits(ids, positions, *args)

    engine._runner.logits = slow  # type: ignore[method-assign]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    (done,) = completions(engine, prompts([1000]))
    assert (done.attention, done.prefill_seconds) == ("dense", 10.0)


def test_dense_documents_and_windows_are_not_measured(tmp_path: Path, folder: Path) -> None:
    config = STEM.replace(max_output_error=1e-6)
    (short,) = completions(make(folder, config.replace(dense_below=200)), prompts([199]))
    assert (short.attention, short.output_error) == ("dense", None)
    assert "dense_below" in short.attention_reason
    types = ["full_attention", "sliding_attention", "full_attention"]
    windows = save_model(tmp_path, "gemma3", head_dim=32, sliding_window=70, layer_types=types)
    plain = completions(make(windows, STEM), prompts([300]))[0]
    (done,) = completions(make(windows, config), prompts([300]))
    assert done.attention == "dense"
    assert done.density_by_layer == (1.0, plain.density_by_layer[1], 1.0)
    assert done.token_ids == completions(make(windows, None), prompts([300]))[0].token_ids


def test_the_trained_model_finds_more_when_it_reads_densely() -> None:
    config = STEM.replace(density=0.15, dense_layers=0, max_output_error=ANY)
    text = report(1500)
    sparse = completions(make(TINY_READER, config, chunk_tokens=512), [text], 40)[0]
    assert sparse.attention == "stem"
    assert sparse.output_error is not None
    limit = sparse.output_error - 1e-4
    done = completions(make(TINY_READER, config.replace(max_output_error=limit), chunk_tokens=512), [text], 40)[0]
    dense = completions(make(TINY_READER, None, chunk_tokens=512), [text], 40)[0]
    assert (done.attention, done.token_ids) == ("dense", dense.token_ids)


def test_layers_on_three_devices(folder: Path) -> None:
    """Errors are summed where the layers are, and the host adds the devices up."""
    for limit in (ANY, 1e-6):
        config = EngineConfig(
            str(folder), device="cpu", attention=STEM.replace(dense_layers=0, max_output_error=limit), chunk_tokens=128,
            arena_tokens=1024, fuse=False,
        )  # fmt: skip
        texts = prompts([300, 250])
        expected = completions(Engine(config), texts)
        model = load_model(config)
        with Devices(), torch.inference_mode():
            runner = ModelRunner(spread(model, 3)[0], config.attention, fuse=False)
            assert list(runner.layer_devices.values()) == chips(3)
            done = completions(Engine(config, runner), texts)
        for name in ("token_ids", "attention", "attention_reason", "density_by_layer"):
            assert [getattr(x, name) for x in done] == [getattr(x, name) for x in expected]
        assert [x.output_error for x in done] == pytest.approx([x.output_error for x in expected], abs=1e-6)


def test_errors_are_means_over_layers_and_come_a_chunk_behind() -> None:
    probe = ErrorProbe((0, 1, 2), 16)
    readings = ProbeReadings(probe, [torch.device("cpu")], 0.5)
    dense = torch.ones(1, 2, 16, 8)
    for index, layers in enumerate([[1.0, 0.5], [0.25, 0.25], [0.5, 1.0]]):
        for error in layers:
            probe.add(index, (1 + error) * dense, dense)
        readings.send(16 * index, 16 * (index + 1))
        assert list(readings.read(newest=1)) == [[], [(0, pytest.approx(0.75))], [(1, pytest.approx(0.25))]][index]
    assert list(readings.read(newest=0)) == [(2, pytest.approx(0.75))]


def test_an_error_that_is_no_number_is_beyond_every_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stem_core.output_error.row_errors", lambda sparse, dense: torch.full((1, 1), torch.nan))
    (done,) = completions(make(folder, STEM.replace(max_output_error=ANY)), prompts([500]))
    assert done.attention == "dense"
    assert "off by nan" in done.attention_reason


def test_a_document_in_parts_has_the_largest_error_and_says_if_some_are_dense() -> None:
    whole = Completion("a", "ok", attention="stem", prompt_tokens=9, density_by_layer=(0.5,), output_error=0.1)
    fallen = Completion(
        "b", "ok", attention="dense", attention_reason="too far", density_by_layer=(1.0,), output_error=0.4
    )
    short = Completion("c", "ok", attention="dense", attention_reason="short", density_by_layer=(1.0,))
    found = EngineFields.of_parts([whole, fallen, short])
    assert found.output_error == 0.4
    assert (found.attention, found.attention_reason) == ("stem", "1 of 3 prompts are dense: too far")
    assert EngineFields.of_parts([short]).output_error is None
    assert EngineFields.of_parts([fallen]).attention_reason == "too far"


@pytest.mark.usefixtures("ray_here")
def test_rows_of_a_job_tell_it_and_older_rows_go_on(tmp_path: Path) -> None:
    """Rows of a version without the column are those of a job without max_output_error, and of no job with one."""
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    text = (TINY_READER.parents[1] / "examples/documents/report-01.txt").read_text()
    (docs / "old.txt").write_text(text[:3000])
    settings: dict[str, Any] = {"device": "cpu", "workers": 1, "max_new_tokens": 4, "arena_tokens": 4096}
    settings |= {"preset": "sampled", "budget": 0.4, "block_size": 16, "dense_layers": 0, "dense_below": 0}
    settings |= {"input": str(docs), "output": str(out), "model": str(TINY_READER)}
    assert run_job(**settings).exit_code == 0
    for part in out.glob("part-*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["output_error"]), part)
    (docs / "new.txt").write_text(text[3000:6000])
    assert run_job(**settings, max_output_error=0).done_now == 1
    with pytest.raises(JobError, match=r"max_output_error: 0.0 -> 1e-06.*--force"):
        run_job(**settings, max_output_error=1e-6)
    (docs / "strict.txt").write_text(text[6000:9000])
    assert run_job(**settings, max_output_error=1e-6, force=True).done_now == 1
    rows = {row["document_id"]: row for row in read_results(out).to_pylist()}
    assert [rows[f"{name}.txt"]["attention"] for name in ("old", "new", "strict")] == ["stem", "stem", "dense"]
    assert rows["old.txt"]["output_error"] is rows["new.txt"]["output_error"] is None
    assert 0 < rows["strict.txt"]["output_error"] < 1
    assert rows["strict.txt"]["attention_reason"].endswith("--max-output-error allows 1e-06")
    assert (rows["strict.txt"]["density"], rows["strict.txt"]["density_by_layer"]) == (1.0, None)
