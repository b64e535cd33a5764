"""Given outputs, read by the engine behind its own prefill, against transformers' own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_models import last_logits, prompts, run, save_model
from torch import Tensor

from kernels.fp8_heads import KEY_GROUP, reference
from pipeline.engine import Engine, EngineConfig, Request, SharedPrompt
from pipeline.engine.model.loading import load_runner
from pipeline.engine.probes.teacher_forcing import TeacherForcingEngine, spans
from stem_core import StemConfig

STEM = StemConfig(
    schedule="density", density=0.4, block_size=16, stride=4, sink_blocks=1, local_blocks=1, dense_layers=0
)


def config_for(folder: Path, **options: Any) -> EngineConfig:
    defaults = {"device": "cpu", "chunk_tokens": 64, "arena_tokens": 2048}
    return EngineConfig(str(folder), **(defaults | options))


def read(
    engine: TeacherForcingEngine, prompt: np.ndarray, token_ids: list[int], max_new_tokens: int
) -> tuple[Tensor, Any]:
    found: list[Tensor] = []
    engine.expect("a", token_ids, lambda rows: found.append(rows.clone()))
    done = run(engine, [Request("a", prompt, max_new_tokens)])["a"]
    assert len(found) <= 1
    return found[0] if found else torch.empty(0), done


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3_longrope"])
def test_what_is_read_has_the_probabilities_that_transformers_gives_it(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, architecture)
    # Odd lengths on both sides of a block and a batch of rows; the output is not what the model would write.
    prompt, token_ids = prompts([147, 2 * KEY_GROUP + 3], seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        whole = torch.as_tensor(np.concatenate([prompt, token_ids]))[None]
        expected = model(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    rows, done = read(TeacherForcingEngine(config_for(folder)), prompt, token_ids.tolist(), 40)
    assert done.status == "ok"
    assert rows.shape == expected.shape
    torch.testing.assert_close(rows, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("prefix", "alone"), [(128, True), (128, False), (40, True)])
def test_what_is_read_behind_a_prefix_has_them_too(prefix: int, alone: bool, tmp_path: Path) -> None:
    """In one piece with it, beside others of it, and behind one that fills no unit of the arena."""
    folder = save_model(tmp_path, "llama")
    prompt, token_ids = prompts([147, 2 * KEY_GROUP + 3], seed=3)
    wanted, _ = read(TeacherForcingEngine(config_for(folder)), prompt, token_ids.tolist(), 40)
    engine, found = TeacherForcingEngine(config_for(folder)), []
    engine.expect("a", token_ids.tolist(), lambda rows: found.append(rows.clone()))
    asked = [Request("a", prompt[prefix:], 40), *([] if alone else [Request("b", prompt[prefix + 1 :], 40)])]
    engine.add_shared(SharedPrompt(prompt[:prefix], tuple(asked)))
    done = run(engine, [])
    assert {name: one.status for name, one in done.items()} == {one.request_id: "ok" for one in asked}
    assert done["a"].token_ids == run(Engine(config_for(folder)), [Request("a", prompt, 40)])["a"].token_ids
    torch.testing.assert_close(found[0], wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_reading_changes_no_output_and_agrees_with_it(
    attention: StemConfig | None, precision: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, "llama", head_dim=32)
    if precision == "fp8" and attention is not None:
        attention = attention.replace(block_size=32)
    config = config_for(folder, attention=attention, precision=precision)
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(prompts([150, 97, 201]))]
    alone = {i: done.token_ids for i, done in run(Engine(config), requests).items()}

    engine = TeacherForcingEngine(config)
    read_along: dict[str, Tensor] = {}
    for i, token_ids in alone.items():
        engine.expect(i, token_ids, lambda rows, i=i: read_along.update({i: rows}))  # type: ignore[misc]
    # An output that is not its own comes between: it must leave nothing behind.
    engine.expect("other", alone["0"][::-1], lambda rows: None)
    beside = run(engine, [Request("other", requests[0].prompt_ids, 24), *requests])
    assert {i: beside[i].token_ids for i in alone} == alone
    assert beside["other"].token_ids == alone["0"]
    assert {i: rows.argmax(-1).tolist() for i, rows in read_along.items()} == alone
    assert engine.forcing_seconds > 0


def test_no_order_among_the_rows_of_a_batch_is_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are written at once, and the token that opens a group of 16 clears the others' values."""
    config = config_for(save_model(tmp_path, "llama", head_dim=32), precision="fp8")
    prompt, token_ids = prompts([150, 40], seed=3)
    wanted, _ = read(TeacherForcingEngine(config), prompt, token_ids.tolist(), 40)
    append = reference.append_kv

    def backwards(
        k: Tensor, v: Tensor, scales: Any, k_arena: Tensor, vt_arena: Tensor, slots: Tensor, run: int
    ) -> None:
        assert run == 1, "tokens of a run may share a group of 16 that one of them opens"
        append(k.flip(0), v.flip(0), scales, k_arena, vt_arena, slots.flip(0))

    monkeypatch.setattr(reference, "append_kv", backwards)
    rows, _ = read(TeacherForcingEngine(config), prompt, token_ids.tolist(), 40)
    torch.testing.assert_close(rows, wanted, atol=0, rtol=0)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (16, 48), (5, 70), (31, 32), (7, 7)])
def test_spans(first: int, last: int) -> None:
    found = list(spans(first, last))
    assert [i for span in found for i in range(*span)] == list(range(first, last))
    assert all(end - begin == 1 for begin, end in found if any(i % KEY_GROUP == 0 for i in range(begin, end)))
    assert len(found) <= 2 * ((last - first) // KEY_GROUP + 2)


def test_the_first_row_is_of_the_sparse_prefill(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    (prompt,) = prompts([300])
    expected = last_logits(Engine(config_for(folder, attention=STEM)), prompt).log_softmax(-1)
    rows, _ = read(TeacherForcingEngine(config_for(folder, attention=STEM)), prompt, [5, 6], 2)
    dense, _ = read(TeacherForcingEngine(config_for(folder)), prompt, [5, 6], 2)
    torch.testing.assert_close(rows[:1].double(), expected, atol=1e-5, rtol=1e-5)
    assert (rows[0] - dense[0]).abs().max() > 0.1
    assert (rows[1] - dense[1]).abs().max() > 0.1


def test_an_output_longer_than_the_request_ends_it(tmp_path: Path) -> None:
    rows, done = read(TeacherForcingEngine(config_for(save_model(tmp_path, "llama"))), prompts([30])[0], [5] * 9, 8)
    assert done.status == "error"
    assert "has room for 8" in done.error
    assert not len(rows)


def test_a_document_that_ends_with_its_first_token_is_read_too(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    (prompt,) = prompts([90])
    wanted, done = read(TeacherForcingEngine(config_for(folder)), prompt, [5, 6, 7], 8)
    engine = TeacherForcingEngine(config_for(folder))
    found: list[Tensor] = []
    engine.expect("a", [5, 6, 7], found.append)
    ended = run(engine, [Request("a", prompt, 8, stop_ids=(done.token_ids[0],))])["a"]
    assert ended.finish_reason == "stop"
    assert ended.output_tokens == 1
    torch.testing.assert_close(found[0], wanted)


def test_engines_share_a_loaded_model_and_switch_its_attention(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    request = Request("a", prompts([300])[0], 12)
    dense, stem = config_for(folder), config_for(folder, attention=STEM)
    expected = [run(Engine(config), [request])["a"] for config in (dense, stem)]
    runner = load_runner(dense)
    for config, want in [*zip((dense, stem), expected, strict=True), (dense, expected[0])]:
        engine = Engine(config, runner)
        done = run(engine, [request])["a"]
        engine.close()
        assert (done.token_ids, done.density, done.attention) == (want.token_ids, want.density, want.attention)
    assert expected[0].density == 1.0 > expected[1].density


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", [None, STEM.replace(block_size=32)], ids=["dense", "stem"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_on_a_gpu_an_output_of_its_own_is_what_it_puts_first(
    precision: str, attention: StemConfig | None, tmp_path: Path
) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    # Weights of usual width: wide ones amplify every rounding.
    folder = save_model(tmp_path, "llama", head_dim=64, hidden_size=256, initializer_range=0.05, eos_token_id=None)
    config = config_for(folder, device="cuda", precision=precision, attention=attention, chunk_tokens=512)
    requests = [Request(str(i), prompt, 40) for i, prompt in enumerate(prompts([1000, 97, 333]))]
    engine = Engine(config)
    alone = {i: done.token_ids for i, done in run(engine, requests).items()}
    engine.close()
    engine = TeacherForcingEngine(config)
    found: dict[str, Tensor] = {}
    for i, token_ids in alone.items():
        engine.expect(i, token_ids, lambda rows, i=i: found.update({i: rows}))  # type: ignore[misc]
    beside = run(engine, requests)
    engine.close()
    for i, token_ids in alone.items():
        assert beside[i].token_ids == token_ids
        chosen = found[i].gather(1, torch.tensor(token_ids, device="cuda")[:, None])[:, 0]
        # Batches of other sizes round otherwise; what differs by more than rounding is wrong.
        assert float((found[i].amax(-1) - chosen).max()) < 0.1
        assert torch.isfinite(found[i]).all()
