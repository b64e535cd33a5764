"""The engine's loop: stops, sampling, admission, failures, aborts, Stem prefill, timings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import VOCABULARY, generate, prompts, run, save_model

from transformers import AutoModelForCausalLM

from pipeline.engine import Completion, Engine, EngineConfig, Request, Sampling, SharedPrompt
from pipeline.engine.run.batch import MAX_STOP_IDS
from pipeline.engine.run.lookup import LookupPolicy
from stem_core import StemConfig, patch_model

NEW = 10
STEM = StemConfig(
    schedule="density", density=0.4, block_size=16, stride=8, sink_blocks=1, local_blocks=2, dense_layers=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def make(folder: Path, **options: Any) -> Engine:
    return Engine(EngineConfig(str(folder), device="cpu", **({"chunk_tokens": 128, "arena_tokens": 4096} | options)))


def verify_always(engine: Engine) -> None:
    """Drafts in every step, if there are any at all."""
    if engine._lookup is not None:
        engine._lookup = LookupPolicy(pays=0.0)


def arena_is_free(engine: Engine) -> bool:
    return engine._arena.extents.largest_free == engine._arena.capacity


@pytest.mark.parametrize("decode_lag", [0, 1, 4])
def test_stops(folder: Path, decode_lag: int) -> None:
    texts = prompts([40, 90, 20])
    whole = [generate(folder, prompt, NEW) for prompt in texts]
    stop = whole[0][4]
    requests = [Request(str(i), prompt, NEW, stop_ids=(stop,)) for i, prompt in enumerate(texts)]
    done = run(make(folder, decode_lag=decode_lag), requests)
    for i, tokens in enumerate(whole):
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert done[str(i)].token_ids == expected
        assert done[str(i)].finish_reason == ("stop" if stop in tokens else "length")
        assert done[str(i)].output_tokens == len(expected)
    assert done["0"].finish_reason == "stop"


@pytest.mark.parametrize("lookup", ["off", "auto"])
@pytest.mark.parametrize("decode_lag", [0, 2])
def test_a_request_may_say_where_it_ends(folder: Path, decode_lag: int, lookup: str) -> None:
    texts = prompts([40, 90, 20])
    whole = [generate(folder, prompt, NEW) for prompt in texts]

    def fails(ids: list[int]) -> bool:
        raise KeyError("no such token")

    untils = [lambda ids: ids[-1] == whole[0][4], lambda ids: len(ids) == NEW, fails]
    requests = [Request(str(i), texts[i], NEW, until=until) for i, until in enumerate(untils)]
    engine = make(folder, decode_lag=decode_lag, prompt_lookup=lookup)
    verify_always(engine)
    done = run(engine, [*requests, Request("3", texts[2], NEW)])
    assert done["0"].token_ids == whole[0][: whole[0].index(whole[0][4]) + 1]
    assert (done["1"].token_ids, done["3"].token_ids) == (whole[1], whole[2])
    reasons = [done[str(i)].finish_reason for i in range(4)]
    assert reasons == ["stop_string", "stop_string", "error", "length"]
    assert done["2"].error == "its text cannot be searched for where to stop: KeyError: 'no such token'"
    assert arena_is_free(engine)


@pytest.mark.parametrize("lookup", ["off", "auto"])
def test_repetition_penalty_is_that_of_transformers(folder: Path, lookup: str) -> None:
    """In one batch with other penalties, behind a shared prefix, and where drafts would be verified."""
    texts, penalties = prompts([150, 60, 60]), [1.3, 1.05, 0.8]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = [
        model.generate(torch.as_tensor(text)[None], max_new_tokens=NEW, do_sample=False, repetition_penalty=penalty)
        for text, penalty in zip(texts, penalties, strict=True)
    ]
    tokens = [out[0, len(text) :].tolist() for out, text in zip(expected, texts, strict=True)]
    plain = [generate(folder, text, NEW) for text in texts]
    assert all(own != other for own, other in zip(tokens, plain, strict=True))
    engine = make(folder, prompt_lookup=lookup, decode_lag=2)
    verify_always(engine)
    requests = [Request(str(i), texts[i], NEW, Sampling(repetition_penalty=penalties[i])) for i in range(3)]
    done = run(engine, [*requests, Request("plain", texts[0], NEW)])
    assert [done[str(i)].token_ids for i in range(3)] == tokens
    assert done["plain"].token_ids == plain[0]
    tails = [Request("same", texts[0][70:], NEW, requests[0].sampling), Request("other", texts[0][70:90], NEW)]
    engine.add_shared(SharedPrompt(texts[0][:70], tuple(tails)))
    assert run(engine, [])["same"].token_ids == tokens[0]


@pytest.mark.parametrize("as_list", [False, True])
def test_end_of_sequence_comes_from_the_model(folder: Path, tmp_path: Path, as_list: bool) -> None:
    prompt = prompts([40])[0]
    tokens = generate(folder, prompt, NEW)
    eos = [199, tokens[3]] if as_list else tokens[3]
    stopping = save_model(tmp_path, "llama", eos_token_id=eos)
    done = run(make(stopping), [Request("a", prompt, NEW)])["a"]
    assert done.token_ids == generate(stopping, prompt, NEW) == tokens[: tokens.index(tokens[3]) + 1]
    assert done.finish_reason == "stop"


def test_first_token_can_be_the_last(folder: Path) -> None:
    prompt = prompts([40])[0]
    first = generate(folder, prompt, 1)
    engine = make(folder)
    done = run(engine, [Request("limit", prompt, 1), Request("stop", prompt, 5, stop_ids=(first[0],))])
    assert done["limit"].token_ids == done["stop"].token_ids == first
    assert (done["limit"].finish_reason, done["stop"].finish_reason) == ("length", "stop")
    assert arena_is_free(engine)


def test_sampling_depends_on_seed_and_id_alone(folder: Path) -> None:
    text = prompts([50, 200, 7, 90])
    hot = Sampling(temperature=1.5, top_p=0.95, seed=3)
    request = Request("a", text[0], NEW, hot)
    alone = run(make(folder), [request])["a"].token_ids
    others = [Request("b", text[1], NEW, replace(hot, repetition_penalty=1.5)), Request("c", text[2], 3), Request("d", text[0], NEW, hot)]
    together = run(make(folder, decode_lag=2), [*others, request])
    assert together["a"].token_ids == alone
    assert together["d"].token_ids != alone, "another id draws other numbers"
    assert together["c"].token_ids == generate(folder, text[2], 3), "a greedy row beside sampled ones stays greedy"
    few = [Request(name, text[0], NEW, Sampling(1.5, top_k=k, seed=3)) for name, k in (("a", 20), ("one", 1))]
    beside = run(make(folder), [*few, *others])
    assert beside["a"].token_ids == run(make(folder, decode_lag=2), few[:1])["a"].token_ids != alone
    assert beside["one"].token_ids == generate(folder, text[0], NEW), "of one token there is no choice"
    other_seed = Request("a", text[0], NEW, Sampling(temperature=1.5, top_p=0.95, seed=4))
    assert run(make(folder), [other_seed])["a"].token_ids != alone


def test_more_documents_than_fit_queue_up(folder: Path) -> None:
    texts = prompts([100] * 9 + [400])
    engine = make(folder, arena_tokens=448, max_live=3)
    live: list[int] = []
    step = engine.step

    def watched() -> list[Completion]:
        live.append(len(engine._live))
        return step()

    engine.step = watched  # type: ignore[method-assign]
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert [done[str(i)].token_ids for i in range(10)] == [generate(folder, prompt, NEW) for prompt in texts]
    assert max(live) == 3
    assert arena_is_free(engine)


def test_documents_decode_together(folder: Path) -> None:
    """Prefill goes first, so that 6 documents of 10 tokens take 9 decode steps and not 54."""
    engine = make(folder, max_live=6)
    steps = []
    launch = engine._decode.run
    engine._decode.run = lambda key: (steps.append(key.rows), launch(key))[1]  # type: ignore[method-assign]
    run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(prompts([30] * 6))])
    assert steps == [6] * (NEW - 1)


def test_batch_shrinks_when_documents_end(folder: Path) -> None:
    engine = make(folder, max_live=8)
    steps = []
    launch = engine._decode.run
    engine._decode.run = lambda key: (steps.append(key.rows), launch(key))[1]  # type: ignore[method-assign]
    texts = prompts([30] * 5)
    done = run(engine, [Request(str(i), prompt, 2 + 3 * (i == 4)) for i, prompt in enumerate(texts)])
    assert steps == [8, 1, 1, 1]
    assert done["4"].token_ids == generate(folder, texts[4], 5)


def test_too_long_is_refused_with_the_numbers(folder: Path) -> None:
    engine = make(folder, arena_tokens=512)
    texts = prompts([505, 502])
    done = run(engine, [Request("long", texts[0], 10), Request("fits", texts[1], 10)])
    assert done["long"].status == "too_long"
    for number in ("505", "515", "512"):
        assert number in done["long"].error
    assert done["long"].prompt_tokens == 505
    assert (done["long"].attention, done["long"].kernel) == (None, None), "nothing ran"
    assert done["fits"].status == "ok"
    assert make(folder, max_context=64).max_context == 64
    assert make(folder).max_context == 2048, "the model's own limit, though the arena holds more"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", [], 5), "at least one token"),
        (Request("x", [3, VOCABULARY], 5), "token ids must lie in"),
        (Request("x", [3, -1], 5), "token ids must lie in"),
        (Request("x", [3.5], 5), "integers"),  # type: ignore[list-item]
        (Request("x", np.zeros((2, 2), dtype=np.int64), 5), "row of at least one token"),  # type: ignore[arg-type]
        (Request("x", [3], 0), "max_new_tokens"),
        (Request("x", [3], 5, stop_ids=tuple(range(MAX_STOP_IDS + 1))), "stop ids"),
    ],
)
def test_bad_request_is_one_error(folder: Path, request_: Request, message: str) -> None:
    engine = make(folder)
    good = prompts([20])[0]
    done = run(engine, [request_, Request("good", good, 3)])
    assert done["x"].status == "error"
    assert message in done["x"].error
    assert done["good"].token_ids == generate(folder, good, 3)


def test_same_id_twice_is_refused(folder: Path) -> None:
    engine = make(folder)
    engine.add(Request("a", [3, 4], 2))
    with pytest.raises(ValueError, match="'a' is in the engine"):
        engine.add(Request("a", [5], 2))


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "oom"), (RuntimeError("kernel broke"), "error")],
)
def test_failing_prefill_ends_one_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    engine = make(folder)
    texts = prompts([60, 300, 80])
    logits = engine._runner.logits

    def fail_late(input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        if input_ids.shape[1] == 300 - 256:  # the last chunk of the second document
            raise error
        return logits(input_ids, *args)

    monkeypatch.setattr(engine._runner, "logits", fail_late)
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert done["1"].status == status
    assert str(error) in done["1"].error
    for i in (0, 2):
        assert done[str(i)].token_ids == generate(folder, texts[i], NEW)
    assert arena_is_free(engine)


@pytest.mark.parametrize("decode_lag", [0, 2])
def test_out_of_memory_in_decode_ends_the_newest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decode_lag: int
) -> None:
    engine = make(folder, decode_lag=decode_lag)
    texts = prompts([60, 75, 80])
    launch, calls = engine._decode.run, []

    def fail_once(key: Any) -> None:
        calls.append(key)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        launch(key)

    monkeypatch.setattr(engine._decode, "run", fail_once)
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert [done[str(i)].status for i in range(3)] == ["ok", "ok", "oom"]
    for i in (0, 1):
        assert done[str(i)].token_ids == generate(folder, texts[i], NEW)
    assert arena_is_free(engine)


def test_logits_that_are_not_finite_end_their_document_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(folder, prompt_lookup="off")
    texts = prompts([60, 75])
    logits, steps = engine._runner.logits, []

    def broken(input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        out = logits(input_ids, *args)
        if input_ids.shape == (2, 1):
            steps.append(1)
            if len(steps) == 3:
                out[0, 5] = torch.nan
        return out

    monkeypatch.setattr(engine._runner, "logits", broken)
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert done["0"].status == "error"
    assert "not finite at output token 3" in done["0"].error
    assert done["0"].token_ids == generate(folder, texts[0], 3)
    assert done["1"].token_ids == generate(folder, texts[1], NEW)


@pytest.mark.parametrize("decode_lag", [0, 2])
def test_abort_anywhere(folder: Path, decode_lag: int) -> None:
    engine = make(folder, max_live=3, decode_lag=decode_lag)
    texts = prompts([60, 75, 300, 80, 90])
    for i, prompt in enumerate(texts):
        engine.add(Request(str(i), prompt, NEW))
    for _ in range(3):
        engine.step()
    assert sorted(d.request.request_id for d in engine._live.values()) == ["0", "1"]
    assert engine._prefilling is not None
    assert engine._prefilling.request.request_id == "2"
    assert engine.abort("2")
    assert engine.abort("3")
    while len(engine._live) < 3 or engine._prefilling:
        engine.step()
    for _ in range(2):
        engine.step()
    assert engine.abort("0")
    assert not engine.abort("0")
    done = run(engine, [])
    assert sorted(done) == ["1", "4"]
    for i in (1, 4):
        assert done[str(i)].token_ids == generate(folder, texts[i], NEW)
    assert arena_is_free(engine)


def test_stem_does_not_depend_on_chunks_or_neighbours(folder: Path) -> None:
    texts = prompts([700, 333, 90])
    results = []
    for chunk_tokens, documents in ((64, 3), (100, 3), (4096, 3), (64, 1)):
        engine = make(folder, attention=STEM, chunk_tokens=chunk_tokens)
        done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts[:documents])])
        results.append([done[str(i)].token_ids for i in range(documents)])
        assert engine.describe()["chunk_tokens"] == {64: 64, 100: 112, 4096: 4096}[chunk_tokens]
    assert results[0] == results[1] == results[2]
    assert results[0][:1] == results[3]
    assert (done["0"].attention, done["0"].attention_reason) == ("stem", "")
    assert done["0"].density == pytest.approx((1 + 0.4 + 0.4) / 3, abs=0.02)


def test_stem_equals_generate_of_the_patched_model(folder: Path) -> None:
    import transformers

    prompt = prompts([700])[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    patch_model(model, STEM)
    ids = torch.as_tensor(prompt)[None]
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
    done = run(make(folder, attention=STEM), [Request("a", prompt, NEW)])["a"]
    assert done.token_ids == expected[0, 700:].tolist()
    assert done.token_ids != generate(folder, prompt, NEW), "sparse prefill must show, or this test shows nothing"


def test_short_prompts_are_dense_and_say_why(folder: Path) -> None:
    config = STEM.replace(dense_below=200)
    texts = prompts([199, 200])
    done = run(make(folder, attention=config), [Request(str(i), prompt, 3) for i, prompt in enumerate(texts)])
    assert (done["0"].attention, done["0"].density) == ("dense", 1.0)
    assert "below dense_below=200" in done["0"].attention_reason
    assert "scores" not in done["0"].kernel
    assert done["1"].attention == "stem"
    assert "scores" in done["1"].kernel
    dense = run(make(folder), [Request("a", texts[0], 3)])["a"]
    assert (dense.attention, dense.attention_reason) == ("dense", "")


@pytest.mark.parametrize("architecture", ["mistral", "phi3", "gemma3"])
def test_rows_say_where_a_sliding_window_keeps_stem_out(tmp_path: Path, architecture: str) -> None:
    # Of these only gemma3's attention modules keep the window as an attribute.
    windows = {"sliding_window": 70} | (
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        if architecture == "gemma3"
        else {}
    )
    engine = make(save_model(tmp_path, architecture, **windows), attention=STEM)
    done = run(engine, [Request("cut", prompts([300])[0], 3), Request("whole", prompts([70])[0], 3)])
    if architecture == "gemma3":
        # The first layer has a window too, but leading layers drop nothing because that was asked for.
        reason = "1 of 3 layers keep to their sliding window"
        assert (done["cut"].attention, done["cut"].attention_reason) == ("stem", reason)
    else:
        assert done["cut"].attention == "dense"
        assert "sliding window" in done["cut"].attention_reason
    assert (done["whole"].attention, done["whole"].attention_reason) == ("stem", "")
    # What is written in the row is what the layers did.
    budgets = [policy.budget(300, window).budgets for policy, window in engine._runner.layers]
    assert sum(budget is not None for budget in budgets) == (architecture == "gemma3")
    token = torch.arange(300)
    seen = (token[:, None] >= token) & (token[:, None] - token < 70)
    blocks = torch.nn.functional.pad(seen, (0, 4, 0, 4)).view(19, 16, 19, 16).any(3).any(1)
    share = blocks.sum().item() / (19 * 20 / 2)
    kept = [share if budget is None else budget.sum() / (19 * 20 / 2) for budget in budgets]
    assert done["cut"].density == pytest.approx(sum(kept) / 3)
    assert done["cut"].density_by_layer == pytest.approx(kept)


def test_times_add_up(folder: Path) -> None:
    begin = time.perf_counter()
    done = run(make(folder, max_live=2), [Request(str(i), p, NEW) for i, p in enumerate(prompts([300, 500, 200]))])
    total = time.perf_counter() - begin
    for completion in done.values():
        assert completion.prefill_seconds > 0
        assert completion.decode_seconds > 0
        assert completion.queue_seconds + completion.prefill_seconds + completion.decode_seconds < total
        assert completion.time_to_first_token == pytest.approx(completion.prefill_seconds, abs=1e-6)
    assert done["2"].queue_seconds > done["0"].queue_seconds
    assert sum(completion.prefill_seconds for completion in done.values()) < total
