"""Hybrids of attention and linear attention: transformers' tokens, and states that belong to one document each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_models
import numpy as np
import pytest
import torch
import transformers
from engine_models import generate, prompts, run, save_model

from pipeline.engine import Engine, EngineConfig, Request, SharedPrompt, describe
from pipeline.engine.config import Completion
from pipeline.engine.kv.arena import ALIGNMENT, ID_BYTES
from pipeline.engine.kv.cache import EngineCache, UnsupportedCacheError
from pipeline.engine.kv.states import CONV, RECURRENT, StateKey, StateShape, StateSlots, slots_for
from pipeline.engine.memory.plan import estimate_plan
from pipeline.engine.model.loading import load_runner
from pipeline.engine.probes.teacher_forcing import TeacherForcingEngine
from stem_core import StemConfig, patch_model
from stem_core.patch import UnsupportedModelError

NEW = 10
# More documents than live ones, so that rows and slots are left and taken again; the fourth ends a chunk at its end.
LENGTHS = [300, 1, 129, 256, 64]
STEM = StemConfig(schedule="density", density=0.3, block_size=16, sink_blocks=1, local_blocks=1, dense_layers=0)
MIXED = ["linear_attention", "full_attention", "linear_attention"]
CONVS = ["conv", "full_attention", "conv"]
DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": MIXED,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", DELTA | EXPERTS),
    "qwen3_next": ("Qwen3NextConfig", DELTA | EXPERTS | {"decoder_sparse_step": 1}),
    "olmo_hybrid": ("OlmoHybridConfig", DELTA | {"linear_num_key_heads": 4}),
    "lfm2": ("Lfm2Config", {"layer_types": CONVS, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("Lfm2MoeConfig", EXPERTS | {"layer_types": CONVS, "num_dense_layers": 1}),
    "lfm3": ("Lfm3Config", {"layer_types": CONVS}),
    # Their code changes the recurrent state in place when it decodes.
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        MAMBA
        | {"layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    ),
    # Attention and Mamba in one layer.
    "falcon_h1": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 128}),
    "bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1]}),
}


@pytest.fixture(scope="module", autouse=True)
def known_to_save_model() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_models, "ARCHITECTURES", HYBRIDS)
        yield


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen"), "qwen3_5")


def config(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(str(folder), **({"device": "cpu", "chunk_tokens": 128, "arena_tokens": 2048} | changes))


def outputs(engine: Engine, texts: list[np.ndarray]) -> list[list[int]]:
    done = run(engine, [Request(str(i), text, NEW) for i, text in enumerate(texts)])
    assert {(completion.status, completion.error) for completion in done.values()} == {("ok", "")}
    return [done[str(i)].token_ids for i in range(len(texts))]


@pytest.mark.parametrize("family", HYBRIDS)
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder, texts = save_model(tmp_path, family), prompts(LENGTHS)
    expected = [generate(folder, text, NEW) for text in texts]
    plan = estimate_plan(config(folder, max_live=3))
    runner = load_runner(config(folder))
    for chunk_tokens, max_live in ((64, 2), (128, 3), (4096, 4)):
        engine = Engine(config(folder, chunk_tokens=chunk_tokens, max_live=max_live), runner)
        assert outputs(engine, texts) == expected, (chunk_tokens, max_live)
        if max_live == plan.max_live:
            found = engine.plan()
            assert found.state_bytes == plan.state_bytes > 0
            assert found.bytes_per_token == plan.bytes_per_token
            held = (found.arena_tokens + ALIGNMENT) * found.bytes_per_token + found.state_bytes
            assert engine._arena.nbytes == held

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    patch_model(model.eval(), STEM)
    sparse = []
    for text in texts:
        ids = torch.as_tensor(text)[None]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        sparse.append(out[0, len(text) :].tolist())
    assert sparse != expected, "Stem must have left something out"
    for chunk_tokens, max_live in ((64, 3), (128, 2)):
        engine = Engine(config(folder, attention=STEM, chunk_tokens=chunk_tokens, max_live=max_live), runner)
        assert outputs(engine, texts) == sparse, (chunk_tokens, max_live)


def test_fused_model_gives_the_same_tokens(qwen: Path) -> None:
    texts = prompts(LENGTHS[:3])
    assert outputs(Engine(config(qwen, fuse=True)), texts) == [generate(qwen, text, NEW) for text in texts]


def test_nothing_of_the_slots_former_documents_is_read(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots hold what is not a number before their first document and after each; idle rows leave them alone."""
    texts = prompts(LENGTHS)
    engine = Engine(config(qwen, max_live=4))
    slots = engine._arena.states
    assert slots is not None
    free = slots.release

    def poisoned(start: int) -> None:
        slot = slots._slots[start]
        free(start)
        for state in slots.states.values():
            state[slot] = torch.nan

    monkeypatch.setattr(slots, "release", poisoned)
    for state in slots.states.values():
        state[:-1] = torch.nan
    # Three rows run as a batch of four, whose last has never held a document; then one more document than rows.
    expected = [generate(qwen, text, NEW) for text in texts]
    assert outputs(engine, texts[:3]) == expected[:3]
    assert outputs(engine, texts) == expected
    assert all(state[:-1].isnan().all() for state in slots.states.values()), "an idle row wrote to a slot"
    assert sorted(slots._free) == [0, 1, 2, 3, 4]


def test_an_aborted_document_gives_its_slot_back(qwen: Path) -> None:
    texts = prompts([300, 200])
    engine = Engine(config(qwen, max_live=1))
    for _ in range(2):
        engine.add(Request("gone", texts[0], NEW))
        engine.step()  # one chunk of three
        assert engine.abort("gone")
    assert outputs(engine, texts[1:]) == [generate(qwen, texts[1], NEW)]


def test_a_prefix_lets_go_of_its_states_with_its_last_request(qwen: Path) -> None:
    """As many documents are live as of a model without states: each of a job's is a prefix and what is asked of it."""
    texts = prompts([200] * 8)
    engine = Engine(config(qwen, max_live=4))
    for index, text in enumerate(texts):
        asked = tuple(Request(f"{index}/{name}", text[128 + name :], NEW) for name in range(1 + (index == 5)))
        engine.add_shared(SharedPrompt(text[:128], asked))
    most, done = 0, {}
    while engine.has_work:
        for completion in engine.step():
            done[completion.request_id] = list(completion.token_ids)
        most = max(most, len(engine._live))
    assert most == 4
    assert [done[f"{index}/0"] for index in range(8)] == [generate(qwen, text, NEW) for text in texts]
    assert done["5/1"] == generate(qwen, np.concatenate([texts[5][:128], texts[5][129:]]), NEW)
    assert engine._arena.states is not None
    assert sorted(engine._arena.states._free) == [0, 1, 2, 3, 4]


def test_recurrent_states_are_float32_in_every_precision(qwen: Path) -> None:
    runner = load_runner(config(qwen, precision="bf16"))
    assert runner.states == {
        StateKey(CONV, 0): StateShape((2 * 32 + 96, 4), torch.bfloat16),
        StateKey(RECURRENT, 0): StateShape((4, 16, 24), torch.float32),
        StateKey(CONV, 2): StateShape((2 * 32 + 96, 4), torch.bfloat16),
        StateKey(RECURRENT, 2): StateShape((4, 16, 24), torch.float32),
    }
    states = 2 * (160 * 4 * 2 + 4 * 16 * 24 * 4)
    assert runner.state_bytes(documents=7) == 9 * states
    assert estimate_plan(config(qwen, precision="bf16", max_live=7)).state_bytes == 9 * states


def test_states_leave_less_memory_for_keys_and_values(qwen: Path) -> None:
    settings = config(qwen, arena_tokens=None, max_context=1 << 20, max_live=1000)
    plan = estimate_plan(settings, total_bytes=1 << 30)
    assert plan.state_bytes > 10 * 2**20
    used = plan.weight_bytes + plan.reserve_bytes + plan.state_bytes
    left = plan.total_bytes - used - (plan.arena_tokens + ALIGNMENT) * (plan.bytes_per_token + ID_BYTES)
    assert 0 <= left < ALIGNMENT * (plan.bytes_per_token + ID_BYTES)
    assert any(line.startswith("  states") for line in plan.lines())


def test_layers_behind_the_last_attention_are_not_skipped(qwen: Path, tmp_path: Path) -> None:
    assert load_runner(config(qwen)).last_layer is None
    ends_attending = save_model(tmp_path, "qwen3_5", layer_types=["linear_attention", *MIXED[:2]])
    assert load_runner(config(ends_attending)).last_layer == 2
    texts = prompts([300, 129])
    assert outputs(Engine(config(ends_attending)), texts) == [generate(ends_attending, text, NEW) for text in texts]


def test_slots() -> None:
    cpu = torch.device("cpu")
    key = StateKey(RECURRENT, 3)
    slots = StateSlots({key: StateShape((2,), torch.float32)}, 2, 8, ALIGNMENT, {3: cpu}, cpu)
    a, b, shared = slots.enter(0, 0, 10), slots.enter(128, 0, 5), slots.enter(384, 0, 1)
    assert {a, b, shared} == {0, 1, 2}
    assert slots.enter(0, 10, 20) == a
    with pytest.raises(RuntimeError, match="all 3 slots"):
        slots.enter(256, 0, 1)
    starts = torch.tensor([128, 0, 0, 128])
    assert slots.rows(starts, torch.tensor([6, 0, 21, 0])).tolist() == [b, 3, a, 3]
    slots.release(0)
    slots.release(0)
    assert slots.rows(torch.tensor([0]), torch.tensor([1])).tolist() == [3], "a document that is gone has the idle slot"
    slots.states[key][b] = 7.0
    slots.copy(128, 256)
    assert slots.states[key][slots.enter(256, 5, 6)].tolist() == [7.0, 7.0]


def test_no_document_goes_on_from_a_step_that_failed(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers' states are a token further than others' by then."""
    engine = Engine(config(qwen, max_live=2))
    texts = prompts([64, 100])

    def decode(*args: Any, **kwargs: Any) -> torch.Tensor:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine._runner, "decode", decode)
    done: dict[str, Completion] = run(engine, [Request(str(i), text, NEW) for i, text in enumerate(texts)])
    assert [completion.status for completion in done.values()] == ["oom", "oom"]
    assert outputs(engine, texts) == [generate(qwen, text, NEW) for text in texts]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "nemotron_h", "falcon_h1"])
def test_given_outputs_are_read_and_leave_nothing_behind(family: str, behind: bool, tmp_path: Path) -> None:
    """With the probabilities that transformers gives them, also behind a document that ends with its first token."""
    folder, texts = save_model(tmp_path, family), prompts(LENGTHS[:3])
    given = prompts([7, 5, 1], seed=5)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = TeacherForcingEngine(config(folder, max_live=2))
    found: dict[str, torch.Tensor] = {}
    new = [NEW, NEW, 1]
    for i, token_ids in enumerate(given):
        engine.expect(str(i), token_ids.tolist(), lambda rows, i=i: found.update({str(i): rows.clone()}))  # type: ignore[misc]
    requests = {i: Request(str(i), text, new[i]) for i, text in enumerate(texts)}
    for i, text in enumerate(texts):
        if behind and (cut := len(text) // 2):  # a prefix, as a job reads
            engine.add_shared(SharedPrompt(text[:cut], (Request(str(i), text[cut:], new[i]),)))
            del requests[i]
    done = run(engine, list(requests.values()))
    for i, (text, token_ids) in enumerate(zip(texts, given, strict=True)):
        assert done[str(i)].status == "ok", done[str(i)].error
        with torch.inference_mode():
            whole = torch.as_tensor(np.concatenate([text, token_ids]))[None]
            expected = model(whole).logits[0, len(text) - 1 : -1].float().log_softmax(-1)
        torch.testing.assert_close(found[str(i)], expected, atol=2e-4, rtol=1e-4)
        assert done[str(i)].token_ids == generate(folder, text, new[i])
    states = engine._arena.states
    assert states is not None
    assert states.free == slots_for(2) - 1, "every slot was given back"


def test_an_attention_of_its_own_is_refused(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These models do not say that they go through AttentionInterface: their code must."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    attention = next(module for module in model.modules() if type(module).__name__ == "Qwen3_5Attention")
    monkeypatch.setattr(type(attention), "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(UnsupportedModelError, match="computes its attention itself"):
        patch_model(model, None)


def test_libraries_that_would_be_faster_are_named(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load_runner(config(qwen))
    assert describe._plain_linear_attention(runner) == [], "nothing is said on a CPU"
    runner.device = torch.device("cuda")
    monkeypatch.setattr(describe, "find_spec", lambda package: None)
    (sentence,) = describe._plain_linear_attention(runner)
    assert "causal-conv1d and flash-linear-attention not installed" in sentence
    monkeypatch.setattr(describe, "find_spec", lambda package: object())
    assert describe._plain_linear_attention(runner) == []


def test_states_are_where_transformers_5_17_reads_them() -> None:
    """Later versions ask for them by methods; what else a layer of its caches has is named."""

    class Named(EngineCache):
        def _keeps(self, key: StateKey) -> bool:
            return True

        def _place(self, key: StateKey) -> Any:
            return key

    layer = Named(seen=5).layers[3]
    assert layer.conv_states[1] == StateKey(CONV, 3, 1)
    assert layer.recurrent_states[0] == StateKey(RECURRENT, 3, 0)
    assert layer.record_past is False
    assert Named(seen=0).layers[3].conv_states[0] is None, "nothing was read yet"
    assert not hasattr(layer, "keys")
    with pytest.raises(UnsupportedCacheError, match=r"its cache's 'layers\[\]\.keys'"):
        layer.keys()
