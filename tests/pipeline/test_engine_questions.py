"""Requests that share the beginning of their prompts: one reading of it, and the outputs of each request alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import ARCHITECTURES, VOCABULARY, generate, prompts, run, save_model
from test_engine_hybrids import HYBRIDS, config

from pipeline.engine import Completion, Engine, EngineConfig, Request, Sampling, SharedPrompt
from pipeline.engine.kv.arena import Extent
from pipeline.engine.run.batch import LENGTH, DecodeBatch, RowStart
from pipeline.engine.run.decode import DecodeRunner
from stem_core import StemConfig

NEW = 8
STEM = StemConfig(
    schedule="density", density=0.5, block_size=32, stride=8, sink_blocks=1, local_blocks=1, dense_layers=1
)
# Tails that end in a step's middle, at its end and one behind it; prefixes that do not end with a group of 16 keys.
TAILS = [5, 1, 16, 128, 129]
PREFIXES = [300, 33]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def make(folder: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"chunk_tokens": 128, "arena_tokens": 4096, "max_live": 8}
    return Engine(EngineConfig(str(folder), device="cpu", **(defaults | options)))


def shared(name: str, prefix: np.ndarray, tails: list[np.ndarray], new: int = NEW, **options: Any) -> SharedPrompt:
    return SharedPrompt(prefix, tuple(Request(f"{name}{i}", tail, new, **options) for i, tail in enumerate(tails)))


def finish(engine: Engine) -> dict[str, Completion]:
    done = {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def everything_is_free(engine: Engine) -> bool:
    states = engine._arena.states
    whole = engine._arena.extents.largest_free == engine._arena.capacity
    return whole and not engine._prefixes and (states is None or states.free == engine.config.max_live + 1)


def alone(engine: Engine, questions: list[SharedPrompt]) -> dict[str, list[int]]:
    """Token ids of every request, each asked by itself."""
    found = {}
    for question in questions:
        for request in question.requests:
            engine.add_shared(SharedPrompt(question.prefix_ids, (request,)))
            found |= {name: done.token_ids for name, done in finish(engine).items()}
    return found


def together(engine: Engine, questions: list[SharedPrompt], others: list[Request]) -> dict[str, Completion]:
    """All at once, and other documents among them."""
    for request in others[::2]:
        engine.add(request)
    for question in questions:
        engine.add_shared(question)
    for request in others[1::2]:
        engine.add(request)
    return finish(engine)


def ask(prefixes: list[int] = PREFIXES, tails: list[int] = TAILS, **options: Any) -> list[SharedPrompt]:
    return [
        shared(f"{number}.", prefix, prompts(tails, seed=10 + number), **options)
        for number, prefix in enumerate(prompts(prefixes, seed=1))
    ]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt_oss", "qwen3_moe"])
def test_dense_is_what_transformers_says(tmp_path: Path, architecture: str) -> None:
    """Dense attention knows no difference between a prompt in two pieces and in one; windows reach over the border."""
    folder = save_model(tmp_path, architecture)
    engine = make(folder)
    questions = ask()
    done = together(engine, questions, [Request("x", prompts([150])[0], NEW)])
    for question in questions:
        for request in question.requests:
            whole = np.concatenate([question.prefix_ids, request.prompt_ids])
            assert done[request.request_id].token_ids == generate(folder, whole, NEW), request.request_id
    assert done["x"].token_ids == generate(folder, prompts([150])[0], NEW)
    assert everything_is_free(engine)


@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_company_changes_nothing(folder: Path, attention: StemConfig | None, precision: str) -> None:
    """In chunks, with other documents, in waves of rows and of arena: the tokens of each question asked by itself."""
    options: dict[str, Any] = {"attention": attention, "precision": precision}
    questions = ask()
    expected = alone(make(folder, **options, chunk_tokens=4096), questions)
    others = [Request(f"x{i}", prompt, NEW) for i, prompt in enumerate(prompts([90, 300, 40], seed=2))]
    plain = {name: done.token_ids for name, done in run(make(folder, **options), others).items()}
    for settings in ({"max_live": 16}, {"max_live": 3, "chunk_tokens": 64}, {"arena_tokens": 640, "decode_lag": 2}):
        engine = make(folder, **(options | settings))
        done = together(engine, questions, others)
        assert {name: completion.token_ids for name, completion in done.items()} == expected | plain, settings
        assert everything_is_free(engine)


def test_prefix_is_read_once_and_paid_once(folder: Path) -> None:
    """Of what is read, everything is in somebody's figures once: tokens and seconds."""
    engine = make(folder, max_live=3, attention=STEM)
    [question] = ask(prefixes=[300])
    read: list[tuple[int, int]] = []
    prefill, behind = engine._runner.prefill, engine._runner.read_behind

    def count(ids: Any, *args: Any) -> Any:
        if not read:
            time.sleep(1.0)
        read.append((0, ids.shape[1]))
        return prefill(ids, *args)

    def count_behind(ids: Any, *args: Any) -> Any:
        read.append((1, ids.shape[1]))
        return behind(ids, *args)

    engine._runner.prefill, engine._runner.read_behind = count, count_behind  # type: ignore[method-assign]
    begin = time.perf_counter()
    done = together(engine, [question], [])
    elapsed = time.perf_counter() - begin
    # Whole units; each request reads the rest with its own.
    assert sum(tokens for kind, tokens in read if kind == 0) == 256
    assert [done[f"0.{i}"].prompt_tokens for i in range(len(TAILS))] == [300 + tail for tail in TAILS]
    paid = [completion for completion in done.values() if completion.prefix_tokens == 0]
    assert len(paid) == 1
    assert [c.prefix_tokens for c in done.values() if c is not paid[0]] == [256] * (len(TAILS) - 1)
    assert paid[0] is next(iter(done.values())), "the one that ends first"
    assert paid[0].prefill_seconds >= 1.0
    # Were the second of sleep in the figures of two, they would add up to more than passed.
    assert sum(c.prefill_seconds for c in done.values()) <= elapsed
    assert all((c.time_to_first_token or 0) == pytest.approx(c.prefill_seconds) for c in done.values())
    assert max(c.queue_seconds for c in done.values()) <= elapsed - 1.0
    assert all(c.attention == "stem" and c.density == paid[0].density and c.kernel for c in done.values())
    assert sum(c.prompt_tokens - c.prefix_tokens for c in done.values()) == sum(tokens for _, tokens in read)


@pytest.mark.parametrize("architecture", ["qwen3_next", "lfm2", "nemotron_h"])
def test_hybrids(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request goes on from a copy of the states behind the prefix."""
    monkeypatch.setitem(ARCHITECTURES, architecture, HYBRIDS[architecture])
    folder = save_model(tmp_path, architecture)
    questions = ask()
    expected = alone(Engine(config(folder, max_live=2)), questions)
    whole = np.concatenate([questions[0].prefix_ids, questions[0].requests[0].prompt_ids])
    assert expected["0.0"] == generate(folder, whole, NEW)
    for max_live in (1, 2, 3, 16):
        engine = Engine(config(folder, max_live=max_live))
        done = together(engine, questions, [Request("x", prompts([150])[0], NEW)])
        assert done.pop("x").status == "ok"
        assert {key: completion.token_ids for key, completion in done.items()} == expected, max_live
        assert everything_is_free(engine)


def test_frequencies_go_by_the_prefix(tmp_path: Path) -> None:
    """LongRoPE: the other requests' lengths do not switch the prefix that they share, nor does a row's own."""
    folder = save_model(tmp_path, "phi3_longrope")
    questions = ask(prefixes=[100, 300], tails=[5, 129])
    engine, bounds = make(folder), set()
    logits = engine._runner.logits

    def note(ids: Any, positions: Any, cache: Any, context: Any, bound: torch.Tensor, *args: Any, **more: Any) -> Any:
        bounds.update(bound.tolist())
        return logits(ids, positions, cache, context, bound, *args, **more)

    engine._runner.logits = note  # type: ignore[method-assign]
    done = together(engine, questions, [])
    assert bounds - {0} == {64, 256}, "whole units of the prefixes; 0: rows that never were in use"
    assert {name: c.token_ids for name, c in done.items()} == alone(make(folder), questions)
    for request in questions[1].requests:  # beyond the limit by the prefix alone, as the whole prompt is
        whole = np.concatenate([questions[1].prefix_ids, request.prompt_ids])
        assert done[request.request_id].token_ids == generate(folder, whole, NEW)


def test_sampling_depends_on_seed_and_id_alone(folder: Path) -> None:
    questions = ask(prefixes=[100], sampling=Sampling(temperature=1.5, top_p=0.95, seed=3))
    expected = alone(make(folder), questions)
    assert {name: c.token_ids for name, c in together(make(folder), questions, []).items()} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)


@pytest.mark.parametrize("when", ["waiting", "reading", "live"])
def test_abort_leaves_the_others(folder: Path, when: str) -> None:
    engine = make(folder, max_live=3, chunk_tokens=64)
    questions = ask(tails=[5, 9, 16, 20])
    expected = alone(make(folder), questions)
    for question in questions:
        engine.add_shared(question)
    if when == "reading":
        engine.step()
        assert engine._reading is not None
    while when == "live" and len(engine._live) < 2:
        engine.step()
    gone = ["0.0", "0.3", "1.1"]
    for name in gone:
        assert engine.abort(name), name
        assert not engine.abort(name)
    done = finish(engine)
    assert {name: c.token_ids for name, c in done.items()} == {n: t for n, t in expected.items() if n not in gone}
    for number in "01":
        assert [c.prefix_tokens == 0 for n, c in done.items() if n.startswith(number)].count(True) == 1
    assert everything_is_free(engine)


@pytest.mark.parametrize("when", ["waiting", "reading", "read", "live"])
def test_the_last_one_frees_the_prefix(folder: Path, when: str) -> None:
    engine = make(folder, chunk_tokens=64)
    engine.add(Request("x", prompts([40])[0], 64))
    engine.step()
    held = engine.arena_use[0]
    [question] = ask(prefixes=[300], tails=[5, 9])
    engine.add_shared(question)
    if when != "waiting":
        engine.step()
    while when in ("read", "live") and engine._reading:
        engine.step()
    while when == "live" and len(engine._live) < 3:
        engine.step()
    assert when == "waiting" or engine.arena_use[0] >= held + 320
    assert engine.abort("0.0")
    assert when == "waiting" or engine.arena_use[0] >= held + 320
    assert engine.abort("0.1")
    assert engine.arena_use[0] == held
    assert list(finish(engine)) == ["x"]


def tokens(engine: Engine) -> dict[str, tuple[int, int]]:
    """By request, those that are read and written so far."""
    return {name: (each.read, each.written) for name, each in engine.so_far.items()}


def test_it_says_how_much_is_read(folder: Path) -> None:
    engine = make(folder, chunk_tokens=128)
    [question] = ask(prefixes=[300], tails=[5, 9])
    engine.add_shared(question)
    assert tokens(engine) == {}
    steps, timed = [], []
    for _ in range(5):
        engine.step()
        steps.append(tokens(engine))
        timed.append({(each.prefill_seconds > 0, each.decode_seconds > 0) for each in engine.so_far.values()})
    # Seconds are told of what is read to its end: the prefix, then each tail; and of steps, from the second token on.
    assert timed == [{(False, False)}, {(True, False)}, {(True, False)}, {(True, False)}, {(True, True)}]
    # The prefix is read to 256, its last 44 tokens with each tail; a prompt that is read has its first token.
    first, second = (request.request_id for request in question.requests)
    alone, both = 256 + 44 + 5, {first: (256 + 44 + 5, 1), second: (44 + 9, 1)}
    assert steps[:4] == [{first: (128, 0)}, {first: (256, 0)}, {first: (alone, 1)}, both]
    assert steps[4] == {first: (alone, 2), second: (44 + 9, 2)}
    assert engine.abort(first)
    assert tokens(engine) == {second: (256 + 44 + 9, 2)}, "who is left has read the prefix"
    finish(engine)
    assert tokens(engine) == {}


def test_it_says_how_much_of_a_prompt_alone_is_read(folder: Path) -> None:
    engine = make(folder, chunk_tokens=128)
    engine.add(Request("x", prompts([200])[0], NEW))
    steps = []
    for _ in range(3):
        engine.step()
        steps.append(tokens(engine))
    assert steps == [{"x": (128, 0)}, {"x": (200, 1)}, {"x": (200, 2)}]


def test_waves_in_the_prefix_s_own_room(folder: Path) -> None:
    """More questions than the arena holds: one after the other, whatever else waits, and one reading of the prefix."""
    engine = make(folder, arena_tokens=448, max_live=4)
    [question] = ask(prefixes=[300], tails=[50] * 6)
    engine.add_shared(question)
    engine.add(Request("x", prompts([400])[0], NEW))
    done = finish(engine)
    assert list(done) == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "x"]
    assert sum(c.prefix_tokens == 0 for c in done.values()) == 2
    assert everything_is_free(engine)


def test_one_request_decodes_as_any_document_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody shares its prefix, and prefix and tail lie in one piece: steps are plain ones, with the same tokens."""
    steps = []
    run = DecodeRunner.run
    monkeypatch.setattr(DecodeRunner, "run", lambda self, key: (steps.append(key), run(self, key)))
    questions = ask(prefixes=[300], tails=[50, 7])
    found = alone(make(folder), questions)
    assert steps
    assert {key.shared for key in steps} == {0}
    together_found = {name: done.token_ids for name, done in together(make(folder), questions, []).items()}
    assert {key.shared for key in steps} == {0, 2}
    assert found == together_found


def test_what_cannot_run(folder: Path) -> None:
    engine = make(folder, arena_tokens=640)
    requests = (
        Request("ok", [5, 6], NEW),
        Request("empty", [], NEW),
        Request("foreign", [VOCABULARY], NEW),
        Request("long", [5] * 400, NEW),
        Request("none", [5], 0),
    )
    engine.add_shared(SharedPrompt(prompts([300])[0], requests))
    done = finish(engine)
    assert {name: completion.status for name, completion in done.items()} == {
        "ok": "ok", "empty": "error", "foreign": "error", "long": "too_long", "none": "error",
    }  # fmt: skip
    assert done["long"].error.startswith("700 prompt tokens + 8 new tokens = 708")
    assert done["ok"].prefix_tokens == 0
    assert all(completion.prefill_seconds == 0 for name, completion in done.items() if name != "ok")
    engine.add_shared(SharedPrompt(prompts([33])[0], (Request("aligned", [5] * 590, NEW),)))
    aligned = finish(engine)["aligned"]
    assert aligned.status == "too_long"
    assert "in units of 64" in aligned.error
    for bad in ([], [VOCABULARY], [[1, 2]], ["a"]):
        engine.add_shared(SharedPrompt(bad, (Request("a", [5], 1), Request("b", [5], 1))))  # type: ignore[arg-type]
        done = finish(engine)
        assert [completion.status for completion in done.values()] == ["error", "error"]
    with pytest.raises(ValueError, match="at least one request"):
        engine.add_shared(SharedPrompt([5], ()))
    with pytest.raises(ValueError, match="two requests"):
        engine.add_shared(SharedPrompt([5], (Request("a", [5], 1), Request("a", [5], 1))))
    engine.add_shared(SharedPrompt([5], (Request("a", [5], 1),)))
    with pytest.raises(ValueError, match="in the engine already"):
        engine.add_shared(SharedPrompt([5], (Request("a", [5], 1),)))
    with pytest.raises(ValueError, match="in the engine already"):
        engine.add(Request("a", [5], 1))


def test_failures(folder: Path) -> None:
    """Reading a prefix fails for all behind it, reading one question for that one alone."""
    engine = make(folder)
    questions = ask(tails=[5, 9, 16])
    expected = alone(make(folder), questions)
    prefill, behind = engine._runner.prefill, engine._runner.read_behind

    def fail_first(ids: Any, *args: Any) -> Any:
        if ids.shape[1] == 33:
            raise torch.OutOfMemoryError("no room")
        return prefill(ids, *args)

    def fail_one(ids: Any, *args: Any) -> Any:
        if ids.shape[1] == 300 - 256 + 9:
            raise RuntimeError("cannot")
        return behind(ids, *args)

    engine._runner.prefill, engine._runner.read_behind = fail_first, fail_one  # type: ignore[method-assign]
    done = together(engine, questions, [])
    assert {name: completion.status for name, completion in done.items()} == {
        "0.0": "ok", "0.1": "error", "0.2": "ok", "1.0": "oom", "1.1": "oom", "1.2": "oom",
    }  # fmt: skip
    assert [c.prefix_tokens for n, c in done.items() if n.startswith("1")] == [0, 33, 33]
    assert all(done[name].token_ids == expected[name] for name in ("0.0", "0.2"))
    assert everything_is_free(engine)


@pytest.mark.parametrize("shares", [True, False])
def test_a_document_that_fails_as_it_begins_to_decode_leaves_its_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    """Its row would decode on, and write into an extent that is another document's by then."""
    engine = make(folder)
    advance = DecodeBatch.advance

    def fail(self: DecodeBatch, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(DecodeBatch, "advance", advance)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(DecodeBatch, "advance", fail)
    [question] = ask(prefixes=[300], tails=[5])
    if shares:
        engine.add_shared(question)
    else:
        engine.add(Request("0.0", question.prefix_ids, NEW))
    assert [completion.status for completion in finish(engine).values()] == ["oom"]
    assert not engine._batch.ints[LENGTH].any()
    assert engine._batch.largest_group == 0
    assert everything_is_free(engine)


def test_output_error_is_the_prefix_s(folder: Path) -> None:
    """A prefix beyond max_output_error is read again, densely, before anybody is behind it."""
    questions = ask(prefixes=[300])
    done = together(make(folder, attention=replace(STEM, max_output_error=1e-6)), questions, [])
    dense = together(make(folder), questions, [])
    assert {n: c.token_ids for n, c in done.items()} == {n: c.token_ids for n, c in dense.items()}
    assert all(c.attention == "dense" and (c.output_error or 0) > 1e-6 for c in done.values())


def test_groups_of_the_decode_batch() -> None:
    batch = DecodeBatch(5, torch.device("cpu"), 64)

    def begin(row: int, prefix: int | None) -> None:
        shared = {} if prefix is None else {"prefix_start": prefix, "prefix_tokens": 7}
        batch.begin(row, RowStart(Extent(640, 64), 9, 4, 0, (), 0.0, 1.0, **shared))

    def groups() -> list[list[int]]:
        return [[row for row in members if row >= 0] for members in batch.members.tolist() if max(members) >= 0]

    for row, prefix in enumerate([64, 128, None, 128, 64]):
        begin(row, prefix)
    assert groups() == [[0, 4], [1, 3]]
    assert batch.largest_group == 2
    batch.clear(0)
    batch.move(4, 0)
    assert groups() == [[0], [1, 3]]
    batch.clear(1)
    batch.clear(0)
    begin(3, None)
    assert groups() == []
    assert batch.largest_group == 0
