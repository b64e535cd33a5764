"""max_output_error on a GPU: errors are right in its precisions, cost no waiting, and send a prompt to dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import prompts, run, save_model
from test_engine_gpu import PRECISIONS, STEM, WIDE

from pipeline.engine import Completion, Engine, EngineConfig, Request
from stem_core import StemConfig, prompt_budget
from stem_core.attention import stem_prefill
from stem_core.output_error import ErrorProbe, row_errors, sampled_blocks
from stem_core.selection import stem_selection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ANY = 100.0  # a limit that only measures
ATTENTIONS = [STEM, WIDE, WIDE.replace(estimator="sample", dense_tail=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama", head_dim=64, max_position_embeddings=8192)


def make(folder: Path, **options: Any) -> Engine:
    defaults = {"device": "cuda", "precision": "bf16", "chunk_tokens": 1024, "arena_tokens": 16_384}
    return Engine(EngineConfig(str(folder), **(defaults | options)))


def completed(folder: Path, attention: StemConfig | None, tokens: int, precision: str, **options: Any) -> Completion:
    engine = make(folder, attention=attention, precision=precision, **options)
    done = run(engine, [Request("a", prompts([tokens])[0], 24)])["a"]
    engine.close()
    assert done.status == "ok", done
    return done


@pytest.mark.parametrize("length", [1000, 4000])
@pytest.mark.parametrize("config", ATTENTIONS)
def test_errors_are_those_of_float64(config: StemConfig, length: int) -> None:
    config = config.replace(max_output_error=0.5, dense_below=0, density=0.5)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, generator=generator, device="cuda").bfloat16() for heads in (8, 2, 2))
    budget = prompt_budget(length, config)
    probe = ErrorProbe(sampled_blocks(budget, config), config.block_size)
    assert probe.blocks
    out = stem_prefill(q, k, v, config, budget, probe=probe)
    assert torch.equal(out, stem_prefill(q, k, v, config, budget))
    kept = stem_selection(q, k, v, config, budget).to_mask(-(-length // config.block_size))
    for index, block in enumerate(probe.blocks):
        rows = torch.arange(*probe.tokens(index, length), device="cuda")
        scores = q[:, :, rows].double() @ k.double().repeat_interleave(4, dim=1).mT / 8
        scores = scores.masked_fill(torch.arange(length, device="cuda") > rows[:, None], -torch.inf)
        tokens = kept[:, :, block].repeat_interleave(config.block_size, dim=-1)[..., :length]
        values = v.double().repeat_interleave(4, dim=1)
        dense = scores.softmax(-1) @ values
        sparse = scores.masked_fill(~tokens[:, :, None], -torch.inf).softmax(-1) @ values
        expected = row_errors(sparse, dense).mean()
        assert float(probe.sums[q.device][index]) == pytest.approx(float(expected), abs=5e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_measuring_changes_nothing_and_going_beyond_gives_dense(
    folder: Path, precision: str, attention: StemConfig
) -> None:
    plain = completed(folder, attention, 4000, precision)
    measured = completed(folder, attention.replace(max_output_error=ANY), 4000, precision)
    dense = completed(folder, None, 4000, precision)
    assert plain.output_error is None
    assert measured.output_error is not None
    # Random values cancel in dense attention's mean over all keys, and less in one over fewer: 1 is no limit here.
    assert 0 < measured.output_error < 2
    assert measured.token_ids == plain.token_ids
    assert (measured.attention, measured.attention_reason) == ("stem", "")
    same = completed(folder, attention.replace(max_output_error=measured.output_error), 4000, precision)
    assert (same.attention, same.token_ids) == ("stem", plain.token_ids)
    fallen = completed(folder, attention.replace(max_output_error=measured.output_error - 1e-5), 4000, precision)
    assert (fallen.attention, fallen.density) == ("dense", 1.0)
    assert "--max-output-error allows" in fallen.attention_reason
    assert fallen.output_error == measured.output_error
    assert (fallen.token_ids, fallen.kernel) == (dense.token_ids, dense.kernel)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_errors_do_not_depend_on_chunks(folder: Path, precision: str) -> None:
    attention = WIDE.replace(max_output_error=ANY)
    found = [completed(folder, attention, 4000, precision, chunk_tokens=n).output_error for n in (512, 1024, 4096)]
    assert found[0] is not None
    # Matrix products of other heights round otherwise.
    assert found == pytest.approx([found[0]] * 3, abs=0.02)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_call_waits_for_the_device(folder: Path, precision: str, attention: StemConfig) -> None:
    """What is waited for is the event behind the chunk before, which this mode does not count."""
    engine = make(folder, attention=attention.replace(max_output_error=ANY), precision=precision)
    engine.add(Request("a", prompts([4000])[0], 2))
    engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step()
        engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run(engine, [])["a"].status == "ok"


def test_other_documents_stay_as_they_are(folder: Path) -> None:
    texts = prompts([4000, 3000, 2500])
    errors = []
    for text in texts:
        engine = make(folder, attention=WIDE.replace(max_output_error=ANY))
        errors.append(run(engine, [Request("a", text, 2)])["a"].output_error)
        engine.close()
    assert None not in errors
    ordered = sorted(error for error in errors if error is not None)
    engine = make(folder, attention=WIDE.replace(max_output_error=(ordered[1] + ordered[2]) / 2))
    done = run(engine, [Request(str(i), text, 24) for i, text in enumerate(texts)])
    attentions = [done[str(i)].attention for i in range(3)]
    assert attentions == ["dense" if error == ordered[2] else "stem" for error in errors]
    assert [done[str(i)].output_error for i in range(3)] == errors
