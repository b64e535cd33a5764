"""A model spread over GPUs: two stages on one GPU, and what only two GPUs show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import prompts, run, save_model

from pipeline.engine import Engine, EngineConfig, Request, Sampling
from pipeline.engine.model.loading import load_runner
from stem_core import StemConfig
from stem_core.kv_scales import power_of_two_scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 CUDA devices, {torch.cuda.device_count()} are here"
)
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8"
)
PRECISIONS = ["bf16", pytest.param("fp8", marks=needs_fp8)]
# Blocks of 128, which the Hopper kernels take.
WIDE = StemConfig(schedule="density", density=0.4, sink_blocks=1, local_blocks=2, dense_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    return save_model(place, "llama", head_dim=64, hidden_size=256, num_hidden_layers=6, max_position_embeddings=8192)


def config_of(folder: Path, **options: Any) -> EngineConfig:
    settings: dict[str, Any] = {"chunk_tokens": 1024, "arena_tokens": 16_384, "max_live": 4, "attention": WIDE}
    return EngineConfig(str(folder), device="cuda:0", **(settings | options))


def tokens(engine: Engine) -> dict[str, list[int]]:
    """Documents of several chunks that decode together, one of them sampled."""
    greedy = [Request(str(i), prompt, 24) for i, prompt in enumerate(prompts([3000, 129, 2048]))]
    sampled = Request("sampled", prompts([700], seed=1)[0], 24, Sampling(temperature=0.7, top_p=0.9))
    done = run(engine, [*greedy, sampled])
    assert {completion.status for completion in done.values()} == {"ok"}
    engine.close()
    return {name: completion.token_ids for name, completion in done.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_stages_on_one_gpu_give_what_one_gives(folder: Path, precision: str) -> None:
    config = config_of(folder, precision=precision)
    gpu = torch.device("cuda", 0)
    engine = Engine(config, load_runner(config, [gpu, gpu]))
    assert engine.describe()["decode"] == "cuda graphs", "of one GPU, however many stages"
    assert tokens(engine) == tokens(Engine(config))


@two_gpus
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_gpus_give_what_one_gives(folder: Path, precision: str, load_format: str) -> None:
    """The same kernels on the same shapes: token for token."""
    config = config_of(folder, precision=precision, load_format=load_format)
    engine = Engine(config_of(folder, precision=precision, load_format=load_format, gpus=2))
    assert engine._runner.devices == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert {tensor.device.index for tensor in engine._arena.tensors()} == {0, 1}
    assert engine.describe()["decode"] == "cuda graphs"
    assert engine.describe()["gpu"].startswith("2 x ")
    assert torch.cuda.current_device() == 0
    found = tokens(engine)
    assert torch.cuda.current_device() == 0
    assert found == tokens(Engine(config))


@two_gpus
def test_the_arena_fills_both_gpus(folder: Path) -> None:
    engine = Engine(config_of(folder, precision="bf16", gpus=2, arena_tokens=None, max_live=2, max_context=8192))
    plan = engine.plan()
    assert [part.device for part in plan.devices] == ["cuda:0", "cuda:1"]
    assert sum(part.bytes_per_token for part in plan.devices) == plan.bytes_per_token
    assert plan.arena_tokens == 2 * 8192, "no more than can be used"
    engine.close()


@two_gpus
@pytest.mark.parametrize("precision", PRECISIONS)
def test_chunks_are_launched_without_waiting(folder: Path, precision: str) -> None:
    """So that the first GPU reads the next chunk while the second one reads this."""
    engine = Engine(config_of(folder, precision=precision, gpus=2))
    engine.add(Request("a", prompts([5000])[0], 2))
    engine.step()
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step()
        assert torch.cuda.current_device() == 0, "after a chunk that ends in the last layer, on the other GPU"
        engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run(engine, [])["a"].status == "ok"
    engine.close()


@two_gpus
def test_scales_wait_for_their_gpu() -> None:
    """That of the layer, not the current one: torch.ldexp alone would read what is not there yet."""
    wanted = torch.tensor([3.0, 0.7, 100.0, 0.0])
    there = wanted.to("cuda:1")
    peak = torch.full_like(there, float("nan"))
    torch.cuda.synchronize(1)
    with torch.cuda.device(1):
        torch.cuda._sleep(1_000_000_000)
    peak.copy_(there)
    assert torch.cuda.current_device() == 0
    assert torch.equal(power_of_two_scale(peak).cpu(), power_of_two_scale(wanted))
