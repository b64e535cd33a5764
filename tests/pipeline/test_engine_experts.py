"""Mixtures of experts with --precision fp8: what a worker loads, what it plans for, and the tokens that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import last_logits, prompts, run, save_model
from torch import nn

from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.devices import weight_bytes
from pipeline.engine.memory.plan import estimate_plan
from pipeline.engine.model import dummy
from pipeline.engine.model.loading import load_model
from stem_core.fp8 import Fp8Experts, Fp8Linear, find_experts

KINDS = ("qwen3_moe", "gpt_oss")


def config_of(folder: Path, **options: Any) -> EngineConfig:
    given = {"device": "cpu", "precision": "fp8", "chunk_tokens": 128, "arena_tokens": 2048} | options
    return EngineConfig(str(folder), **given)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of usual width: the random models of the exact tests amplify every rounding of fp8."""
    place = tmp_path_factory.mktemp(request.param)
    return save_model(place, request.param, head_dim=32, initializer_range=0.05)


def written(engine: Engine, lengths: list[int]) -> list[list[int]]:
    requests = [Request(str(i), prompt, 8) for i, prompt in enumerate(prompts(lengths))]
    done = run(engine, requests)
    assert {completion.status for completion in done.values()} == {"ok"}, done
    return [list(done[str(i)].token_ids) for i in range(len(lengths))]


def test_tokens_do_not_depend_on_chunks_or_neighbours(folder: Path) -> None:
    together = written(Engine(config_of(folder)), [300, 129, 1])
    assert written(Engine(config_of(folder, chunk_tokens=64)), [300, 129, 1]) == together
    assert written(Engine(config_of(folder, max_live=1)), [300, 129, 1]) == together


def test_logits_stay_close_to_float32s(folder: Path) -> None:
    prompt = prompts([200])[0]
    wide = last_logits(Engine(config_of(folder, precision="fp32")), prompt)
    got = Engine(config_of(folder))
    assert got.describe()["fp8"]["experts"] == 3
    assert float((last_logits(got, prompt) - wide).norm() / wide.norm()) < 0.1


def test_the_plan_counts_a_byte_for_a_weight(folder: Path) -> None:
    plan = estimate_plan(config_of(folder))
    assert plan.weight_bytes == weight_bytes(load_model(config_of(folder)))
    # Embedding and output head, k, v and the last of three layers keep their four bytes.
    assert plan.weight_bytes < 0.6 * estimate_plan(config_of(folder, precision="fp32")).weight_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_the_same_in_every_precision(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path, kind)
    plain = load_model(config_of(folder, precision="fp32", load_format="dummy"))
    model = load_model(config_of(folder, load_format="dummy"))
    found = find_experts(plain)
    assert len(found) == 3
    for name, experts in found.items():
        expected = Fp8Experts(experts)
        got = model.get_submodule(name)
        for own, parameter in expected.named_parameters():
            assert torch.equal(parameter.float(), got.get_parameter(own).float()), (name, own)
        assert expected.entry.float().std() > 0


def test_random_experts_are_in_wide_types_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """56 GiB of Qwen3-30B-A3B's experts would not fit beside anything."""
    models: list[nn.Module] = []
    wide: list[int] = []
    quantize = dummy.quantize_linears

    def watched(model: nn.Module, skip: Any, *, fill: Any, **options: Any) -> nn.Module:
        def fill_and_count(name: str, module: nn.Module) -> None:
            fill(name, module)
            held = [weight for experts in find_experts(model).values() for weight in experts.parameters()]
            wide.append(sum(weight.ndim == 3 and not weight.is_meta for weight in held))

        models.append(model)
        return quantize(model, skip, fill=fill_and_count, **options)

    monkeypatch.setattr(dummy, "quantize_linears", watched)
    load_model(config_of(save_model(tmp_path, "qwen3_moe"), load_format="dummy"))
    assert max(wide) == 2  # one layer's gate_up_proj and down_proj
    assert any(isinstance(module, Fp8Linear) for module in models[0].modules())
