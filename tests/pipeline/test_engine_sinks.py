"""gpt-oss in the engine: attention sinks with Stem, in fp8, in chunks, under the guard on the output's error.

Dense tokens against transformers' own: tests/pipeline/test_engine_generate.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import generate, last_logits, prompts, run, save_model
from torch import Tensor

from kernels.block_selection import BlockSelection
from pipeline.engine import Completion, Engine, EngineConfig, Request
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.model.self_check import self_check
from stem_core import StemConfig
from stem_core.selection import stem_selection

NEW = 8
LENGTHS = [900, 333, 129, 1]
STEM = StemConfig(
    schedule="density", density=0.3, block_size=32, stride=8, sink_blocks=1, local_blocks=2, dense_layers=0
)
# The middle layer of three is not windowed.
SPARSE_LAYER = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "gpt_oss")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of usual width: the random models of the exact tests amplify every rounding of fp8."""
    return save_model(tmp_path_factory.mktemp("usual"), "gpt_oss", head_dim=32, initializer_range=0.05)


def make(folder: Path, **options: Any) -> Engine:
    return Engine(EngineConfig(str(folder), **({"device": "cpu", "chunk_tokens": 128, "arena_tokens": 4096} | options)))


def completions(engine: Engine, lengths: list[int] = LENGTHS) -> list[Completion]:
    texts = prompts(lengths)
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert {completion.status for completion in done.values()} == {"ok"}, done
    return [done[str(i)] for i in range(len(texts))]


def tokens(engine: Engine, lengths: list[int] = LENGTHS) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions(engine, lengths)]


@pytest.mark.parametrize("chunk_tokens", [64, 4096])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_stem_that_keeps_everything_gives_transformers_tokens(
    folder: Path, estimator: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, selection and the sparse kernel run; then every causal block is put where the selection was."""
    selected = []

    def keep_all(q: Tensor, *args: Any, start: int, **kwargs: Any) -> BlockSelection:
        kept = stem_selection(q, *args, start=start, **kwargs)
        selected.append(kept.counts.sum().item())
        rows = torch.arange(kept.counts.shape[2]) + start // STEM.block_size
        counts = (rows + 1).to(torch.int32).expand(kept.counts.shape).contiguous()
        blocks = torch.arange(int(counts.max()), dtype=torch.int32).expand(*counts.shape, -1).contiguous()
        selected.append(-counts.sum().item())
        return BlockSelection(blocks, counts)

    monkeypatch.setattr("stem_core.attention.stem_selection", keep_all)
    engine = make(folder, attention=STEM.replace(estimator=estimator), chunk_tokens=chunk_tokens)
    assert tokens(engine) == [generate(folder, prompt, NEW) for prompt in prompts(LENGTHS)]
    assert sum(selected) < 0, "the selection had dropped nothing"


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_results_do_not_depend_on_chunks_or_neighbours(usual: Path, estimator: str, precision: str) -> None:
    options = {"attention": STEM.replace(estimator=estimator), "precision": precision}
    wanted = tokens(make(usual, chunk_tokens=4096, **options))
    assert tokens(make(usual, chunk_tokens=64, **options)) == wanted
    assert tokens(make(usual, chunk_tokens=160, **options), LENGTHS[:1]) == wanted[:1]
    density = completions(make(usual, **options), LENGTHS[:1])[0].density_by_layer
    assert density is not None
    assert density[SPARSE_LAYER] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
def test_fp8_is_close_and_would_not_be_without_sinks(
    usual: Path, attention: StemConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts([300])[0]
    wide = last_logits(make(usual, attention=attention, precision="fp32"), prompt)
    got = make(usual, attention=attention, precision="fp8")
    about = got.describe()["fp8"]
    assert (about["linears"], about["experts"]) == (4, 3)  # q and o of two of three layers, and what stands for the MLP
    error = float((last_logits(got, prompt) - wide).norm() / wide.norm())
    monkeypatch.setattr("stem_core.attention._leave_to_sinks", lambda out, lse, sinks: out)
    without = last_logits(make(usual, attention=attention, precision="fp8"), prompt)
    assert 1e-3 < error < 0.15
    assert float((without - wide).norm() / wide.norm()) > 2 * error


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_decoding_agrees_with_prefill(usual: Path, precision: str) -> None:
    """The logits behind the last token, which decode reads from the arena in one engine and prefill in the other."""
    prompt = prompts([300])[0]
    seen: list[torch.Tensor] = []
    engine = make(usual, precision=precision, prompt_lookup="off")
    logits = engine._runner.logits

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(logits(*args, **kwargs))
        return seen[-1]

    engine._runner.logits = spy  # type: ignore[method-assign]
    written = run(engine, [Request("a", prompt, 3)])["a"].token_ids
    decoded = seen[-1][0].double()
    again = last_logits(make(usual, precision=precision), np.concatenate([prompt, written[:2]]))[0]
    assert float((decoded - again).norm() / again.norm()) < (1e-4 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_guard_on_the_output_error(usual: Path, precision: str) -> None:
    """Measured with the sinks, and what goes beyond the limit becomes dense."""
    dense = completions(make(usual, precision=precision), LENGTHS[:1])[0]
    loose, tight = (
        completions(make(usual, attention=STEM.replace(max_output_error=limit), precision=precision), LENGTHS[:1])[0]
        for limit in (100.0, 1e-6)
    )
    assert loose.attention == "stem"
    assert loose.output_error is not None
    assert 1e-3 < loose.output_error < 100
    assert tight.attention == "dense"
    assert tight.token_ids == dense.token_ids
    assert tight.output_error is not None
    assert tight.output_error == pytest.approx(loose.output_error, rel=1.0)


def test_self_check_passes(folder: Path, usual: Path) -> None:
    """gpt_oss is of the tested types, so that loading leaves the check out; other models with sinks get it."""
    for place, precision in ((folder, "fp32"), (usual, "fp8")):
        self_check(ModelRunner(load_model(EngineConfig(str(place), device="cpu", precision=precision)), None))
