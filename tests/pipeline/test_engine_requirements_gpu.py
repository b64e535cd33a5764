"""On a GPU rounding depends on shapes: sound models must pass the self-check there, too, and faults must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_models import ARCHITECTURES, COMMON, save_model
from test_engine_keys import DAMAGES, rewrite
from test_engine_requirements import FAULTS
from transformers.models.qwen3 import modeling_qwen3

from pipeline.engine import EngineConfig, EngineError, ModelLoadError
from pipeline.engine.model import self_check
from pipeline.engine.model.loading import load_model, load_runner
from pipeline.engine.model.runner import ModelRunner
from stem_core import StemConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRECISIONS = ["fp32", "bf16", "fp16", "fp8"]
STEM = StemConfig(block_size=32, schedule="density", density=0.5, dense_below=0)
WIDE = {"head_dim": 64, "hidden_size": 256, "initializer_range": 0.05}
# Types without a test of their own, dense ones and mixtures of many experts.
UNTESTED: dict[str, dict[str, Any]] = {
    "SmolLM3Config": {},
    "Cohere2Config": {"sliding_window": 64},
    "OlmoeConfig": {"num_experts": 32, "num_experts_per_tok": 4},
    "MixtralConfig": {"num_local_experts": 8},
    "Qwen2MoeConfig": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
}


@pytest.fixture(autouse=True)
def _needs_fp8(request: pytest.FixtureRequest) -> None:
    precision = getattr(request.node, "callspec", None) and request.node.callspec.params.get("precision")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gemma2", "phi3_longrope"}))
def test_sound_models_pass(tmp_path: Path, architecture: str, precision: str) -> None:
    folder = save_model(tmp_path, architecture, **WIDE)
    model = load_model(EngineConfig(str(folder), device="cuda", precision=precision))
    self_check.self_check(ModelRunner(model, STEM))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", UNTESTED)
def test_untested_types_load(tmp_path: Path, name: str, precision: str) -> None:
    torch.manual_seed(1)
    config = getattr(transformers, name)(**(COMMON | WIDE | UNTESTED[name]))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    load_runner(EngineConfig(str(tmp_path), device="cuda", precision=precision, attention=STEM))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type, precision: str) -> None:
    folder = save_model(tmp_path, "qwen3", **WIDE)
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", fault)
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    with pytest.raises(EngineError, match=FAULTS[fault]):
        load_runner(EngineConfig(str(folder), device="cuda", precision=precision, fuse=False))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_the_models_are_named(tmp_path: Path, damage: str, precision: str) -> None:
    folder = save_model(tmp_path, "llama", tie_word_embeddings=False)
    change, message = DAMAGES[damage]
    with pytest.raises(ModelLoadError, match=message):
        load_model(EngineConfig(str(rewrite(folder, change)), device="cuda", precision=precision))


def test_wide_heads_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama", head_dim=576)
    with pytest.raises(EngineError, match="layer 0 has heads of 576"):
        load_runner(EngineConfig(str(folder), device="cuda", precision="bf16"))
