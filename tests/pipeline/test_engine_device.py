"""Prefill and decode on the meta device, where reading a value or mixing devices raises: what a CUDA graph asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import save_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import pipeline.engine.run.decode
import stem_core.attention
from pipeline.engine.config import EngineConfig
from pipeline.engine.kv.arena import Arena, Extent
from pipeline.engine.model.loading import load_config
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.batch import DecodeBatch
from pipeline.engine.run.decode import DecodeRunner, StepKey
from pipeline.engine.run.lookup import DRAFTS
from pipeline.engine.run.prefill import Prefill

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses every operation between the host and the device, and every read of a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A 0-dimensional host tensor rides along as a kernel argument, except where it is copied.
        host = [t for t in tensors if t.device.type == "cpu" and (t.ndim > 0 or "copy" in str(func))]
        if host and any(t.device == META for t in tensors):
            raise AssertionError(f"{func} works across devices")
        return out


def no_prefill(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(q)


def no_decode(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, **kwargs: Any) -> Tensor:
    assert starts.device == lengths.device == k.device == q.device == META
    assert (starts.dtype, lengths.dtype) == (torch.int64, torch.int32)
    return torch.empty_like(q)


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral", "phi3", "phi3_longrope", "gemma3", "granite", "olmo2"])
def runner(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    monkeypatch.setattr(stem_core.attention, "stem_prefill", no_prefill)
    monkeypatch.setattr(stem_core.attention, "decode_attention", no_decode)
    config = load_config(EngineConfig(str(save_model(tmp_path, request.param))))
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return ModelRunner(model, None)


def test_steps_stay_on_the_device(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(runner.shapes, 4096, runner.dtype, runner.layer_devices)
    batch = DecodeBatch(8, META, runner.vocabulary)
    decode = DecodeRunner(runner, arena, batch, 2048, use_graphs=False)
    prefill = Prefill(runner, arena, Extent(0, 1088), np.zeros(1000, dtype=np.int64), 10, 256)
    with OneDevice(), torch.inference_mode():
        while not prefill.done:
            logits = prefill.step()
        assert logits is not None
        batch.advance(logits, 3, sampled=True)
        decode.run(StepKey(4, sampled=False))
        decode.run(StepKey(8, sampled=True))
        # The reference reads lengths on the host, the kernel does not.
        found = torch.zeros(8, DRAFTS, dtype=torch.int64, device=META), torch.zeros(8, dtype=torch.int64, device=META)
        monkeypatch.setattr(pipeline.engine.run.decode, "find_drafts", lambda *_, **__: found)
        decode.run(StepKey(8, sampled=True, drafts=DRAFTS))
        decode.run(StepKey(8, sampled=False, shared=2, drafts=DRAFTS))
        batch.move(3, 1)
        batch.clear(1)


def test_the_guard_guards() -> None:
    x = torch.empty(3, device=META)
    with OneDevice():
        x + 1
        with pytest.raises(AssertionError, match="across devices"):
            x.copy_(torch.zeros(3))
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            x.sum().item()
