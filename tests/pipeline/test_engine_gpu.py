"""What only a GPU shows: captured steps, readback behind the device, measured memory, no waiting in prefill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import generate, last_logits, prompts, run, save_model
from test_engine_wide_layers import biased_model

from pipeline.engine import Engine, EngineConfig, Request, Sampling
from pipeline.engine.model.loading import load_model
from stem_core import StemConfig
from tools.benchmark.engine.agreement import check_agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8"
)

NEW = 24
LENGTHS = [3000, 1, 129, 700, 64]
GENTLE: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 256,
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
    "eos_token_id": None,
}
PRECISIONS = ["bf16", pytest.param("fp8", marks=needs_fp8)]
# Blocks of 128, which the Hopper kernels take.
WIDE = StemConfig(schedule="density", density=0.4, sink_blocks=1, local_blocks=2, dense_layers=1)
STEM = StemConfig(schedule="density", density=0.4, block_size=32, stride=8, sink_blocks=1, local_blocks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 64 is the smallest head size that all kernels take.
    return save_model(tmp_path_factory.mktemp("model"), "llama", head_dim=64, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def gentle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of usual width: those of `folder` amplify every rounding."""
    return save_model(tmp_path_factory.mktemp("gentle"), "llama", **GENTLE)


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def make(folder: Path, **options: Any) -> Engine:
    defaults = {"device": "cuda", "precision": "bf16", "chunk_tokens": 1024, "arena_tokens": 16_384}
    return Engine(EngineConfig(str(folder), **(defaults | options)))


def tokens(engine: Engine, **options: Any) -> list[list[int]]:
    requests = [Request(str(i), prompt, NEW, **options) for i, prompt in enumerate(prompts(LENGTHS))]
    done = run(engine, requests)
    assert {completion.status for completion in done.values()} == {"ok"}, done
    engine.close()
    return [done[str(i)].token_ids for i in range(len(LENGTHS))]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_float32_equals_generate(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path, architecture, head_dim=64, max_position_embeddings=8192)
    expected = [generate(folder, prompt, NEW, "cuda") for prompt in prompts(LENGTHS)]
    assert tokens(make(folder, precision="fp32")) == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_are_used_and_change_nothing(folder: Path, precision: str) -> None:
    captured = make(folder, precision=precision)
    assert captured.describe()["decode"] == "cuda graphs"
    assert tokens(captured) == tokens(make(folder, precision=precision, cuda_graphs=False))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.2, top_p=0.9, seed=5)])
def test_running_ahead_changes_nothing(folder: Path, sampling: Sampling) -> None:
    # Without drafts: how many rows a step verifies depends on what was read back, and bfloat16 rounds by rows.
    plain = {"prompt_lookup": "off"}
    stop = tokens(make(folder, **plain))[0][7]
    options = {"sampling": sampling, "stop_ids": (stop,)}
    every_step = tokens(make(folder, decode_lag=0, **plain), **options)
    assert tokens(make(folder, decode_lag=1, **plain), **options) == every_step
    assert tokens(make(folder, decode_lag=5, **plain), **options) == every_step


def test_stem_does_not_depend_on_chunks(folder: Path) -> None:
    results = [tokens(make(folder, attention=STEM, chunk_tokens=n)) for n in (512, 1024, 4096)]
    same = sum(
        a == b for r in results[1:] for x, y in zip(results[0], r, strict=True) for a, b in zip(x, y, strict=False)
    )
    # Matrix products of other heights round otherwise, so that a near-tie may turn; selections do not.
    assert same >= 0.9 * sum(len(x) for r in results[1:] for x in r)


@pytest.mark.parametrize("attention", [None, STEM, WIDE])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_prefill_does_not_wait_for_the_device(folder: Path, attention: StemConfig | None, precision: str) -> None:
    engine = make(folder, attention=attention, precision=precision)
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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plan_leaves_its_reserve_free(folder: Path, precision: str) -> None:
    engine = make(folder, arena_tokens=None, max_live=64, precision=precision)
    plan = engine.plan()
    assert plan.bytes_per_token == 3 * 2 * 64 * 2 * (1 if precision == "fp8" else 2)
    free, total = torch.cuda.mem_get_info()
    assert plan.total_bytes == total
    assert plan.arena_bytes + plan.weight_bytes + plan.reserve_bytes < total
    assert free > 256 * 2**20
    done = run(engine, [Request("a", prompts([plan.max_context - 8])[0], 8)])
    assert done["a"].status == "ok"
    assert plan.weight_bytes < done["a"].peak_gpu_bytes < total


def test_documents_queue_for_a_small_arena(folder: Path) -> None:
    engine = make(folder, arena_tokens=4096)
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(prompts([3000] * 4))])
    assert {completion.status for completion in done.values()} == {"ok"}
    assert done["3"].queue_seconds > done["0"].queue_seconds


def all_free_memory() -> list[torch.Tensor]:
    """Tensors that leave no MiB free, neither on the device nor in holes of the allocator."""
    hog, size = [], 2**36
    while size >= 2**20:
        try:
            hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return hog


def test_out_of_memory_is_one_row(folder: Path) -> None:
    engine = make(folder, chunk_tokens=8192)
    text = prompts([8000])[0]
    torch.cuda.empty_cache()
    hog = all_free_memory()
    done = run(engine, [Request("starved", text, 4)])
    assert done["starved"].status == "oom"
    assert "memory" in done["starved"].error
    del hog
    torch.cuda.empty_cache()
    assert run(engine, [Request("fed", text, 4)])["fed"].status == "ok"


def test_trained_model_agrees_in_bfloat16() -> None:
    """With generate, on reports; where they part, the two tokens' logits must be a tie in bfloat16."""
    found = check_agreement("cuda", "bf16", [1200, 5000], 32)
    assert found["ok"], found
    assert found["identical_share"] > 0.5


def prefill_logits(engine: Engine, prompt: Any) -> torch.Tensor:
    """Logits after the whole prompt; the engine's memory is given back."""
    logits = last_logits(engine, prompt)
    engine.close()
    return logits


@needs_fp8
@pytest.mark.parametrize("attention", [None, STEM, WIDE, WIDE.replace(estimator="sample")])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_fp8_is_as_exact_as_its_reference(tmp_path: Path, architecture: str, attention: StemConfig | None) -> None:
    """Both against float32 on the CPU; the GPU's activations are in bfloat16 besides."""
    folder = save_model(tmp_path, architecture, **GENTLE)
    (prompt,) = prompts([1500])
    options = {"attention": attention, "arena_tokens": 4096}
    exact = prefill_logits(make(folder, device="cpu", precision="fp32", **options), prompt)
    reference = prefill_logits(make(folder, device="cpu", precision="fp8", **options), prompt)
    got = prefill_logits(make(folder, precision="fp8", **options), prompt)
    allowed, error = ((x - exact).norm() / exact.norm() for x in (reference, got))
    assert allowed < 0.2
    assert error < 1.5 * allowed + 0.02, f"{error:.3f}, reference {allowed:.3f}"


@needs_fp8
@pytest.mark.parametrize("attention", [None, WIDE.replace(estimator="sample")])
def test_fp8_with_a_wide_layer(tmp_path: Path, attention: StemConfig | None) -> None:
    """As exact as its reference, captured steps as eager ones, memory by the layer."""
    folder = biased_model(tmp_path, **GENTLE)
    (prompt,) = prompts([1500])
    options = {"attention": attention, "arena_tokens": 16_384}
    exact = prefill_logits(make(folder, device="cpu", precision="fp32", **options), prompt)
    reference = prefill_logits(make(folder, device="cpu", precision="fp8", **options), prompt)
    engine = make(folder, precision="fp8", **options)
    assert engine.describe()["precision"] == "fp8, layer 0 in bf16"
    assert engine.describe()["decode"] == "cuda graphs"
    assert engine.plan().bytes_per_token == 2 * 2 * 64 * (2 + 1 + 1)
    got = prefill_logits(engine, prompt)
    allowed, error = ((x - exact).norm() / exact.norm() for x in (reference, got))
    # The first layer's keys in bfloat16: 0.4% of 300 in a channel.
    in_bf16 = (prefill_logits(make(folder, precision="bf16", **options), prompt) - exact).norm() / exact.norm()
    assert allowed < 0.2
    assert error < 1.5 * (allowed + in_bf16) + 0.02, f"{error:.3f}, reference {allowed:.3f}, bf16 {in_bf16:.3f}"
    captured, eager = (tokens(make(folder, precision="fp8", cuda_graphs=graphs, **options)) for graphs in (True, False))
    assert captured == eager


@needs_fp8
def test_fp8_decodes_as_it_prefills(gentle: Path) -> None:
    """Decode steps after a prompt, against the prompt grown by their tokens: logits within fp8's noise."""
    (prompt,) = prompts([700])
    engine = make(gentle, precision="fp8", cuda_graphs=False, decode_lag=0, prompt_lookup="off")  # a row a step
    seen: list[torch.Tensor] = []
    logits = engine._runner.logits

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(logits(*args, **kwargs)[:1])
        return seen[-1]

    engine._runner.logits = spy  # type: ignore[method-assign]
    done = run(engine, [Request("a", prompt, 20)])["a"]
    grown = [*prompt.tolist(), *done.token_ids[:-1]]
    expected = prefill_logits(make(gentle, precision="fp8"), grown)
    error = (seen[-1].double().cpu() - expected).norm() / expected.norm()
    assert error < 0.1, error


@needs_fp8
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_loading_in_fp8_never_holds_the_model_in_16_bits(tmp_path: Path, load_format: str) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64}
    folder = save_model(tmp_path, "llama", **shape)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(EngineConfig(str(folder), device="cuda", precision="fp8", load_format=load_format))
    peak = torch.cuda.max_memory_allocated() - before
    bf16 = 2 * sum(p.numel() for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert peak < 0.75 * bf16, f"{peak / bf16:.2f} of the model in 16 bits"


@needs_fp8
def test_stem_in_fp8_does_not_depend_on_chunks(gentle: Path) -> None:
    (prompt,) = prompts([3000])
    logits = [
        prefill_logits(make(gentle, attention=WIDE, precision="fp8", chunk_tokens=n), prompt) for n in (512, 1024, 4096)
    ]
    for other in logits[1:]:
        # Matrix products of other heights round otherwise in bfloat16; selections do not.
        assert (other - logits[0]).norm() / logits[0].norm() < 0.05
