"""Prompt lookup: the tokens of single steps, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_models
import numpy as np
import pytest
import torch
from engine_models import ARCHITECTURES, TINY_READER, VOCABULARY, prompts, run, save_model
from test_engine_hybrids import HYBRIDS
from test_engine_parts import row_start
from tokenizers import Tokenizer

from pipeline.engine import Completion, Engine, EngineConfig, Request, Sampling, SharedPrompt
from pipeline.engine.run import decode
from pipeline.engine.run.batch import IDLE, LENGTH, NOT_FINITE, TOKEN, DecodeBatch
from pipeline.engine.run.decode import StepKey
from pipeline.engine.run.lookup import DRAFTS, EXPECTED, FIRST_PAUSE, LONGEST_PAUSE, Gain, LookupPolicy
from stem_core import StemConfig

STEM = StemConfig(
    schedule="density", density=0.5, block_size=32, stride=8, sink_blocks=1, local_blocks=1, dense_layers=1
)
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def make(folder: Path, lookup: str = "auto", **options: Any) -> Engine:
    defaults: dict[str, Any] = {"chunk_tokens": 128, "arena_tokens": 4096, "max_live": 4, "prompt_lookup": lookup}
    engine = Engine(EngineConfig(str(folder), device="cpu", **(defaults | options)))
    if engine._lookup is not None:
        engine._lookup = LookupPolicy(pays=0.0)  # every step verifies drafts
    return engine


def tokens_of(done: dict[str, Completion]) -> dict[str, list[int]]:
    for completion in done.values():
        assert completion.status == "ok", completion.error
    return {name: completion.token_ids for name, completion in done.items()}


def steps_of(done: dict[str, Completion]) -> float:
    """Tokens per step, mean over the documents."""
    return float(np.mean([completion.tokens_per_step for completion in done.values()]))


class Oracle:
    """In place of find_drafts: what each document is known to say next, wrong from the `wrong`-th draft on where the
    output's place is a multiple of three.

    said: by a document's first token (behind a shared prefix, by that one's and its own), prompt and output.
    """

    def __init__(self, said: dict[tuple[int, ...], list[int]], wrong: int) -> None:
        self._said, self._wrong = said, wrong

    def __call__(
        self, ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, *, drafts: int, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(starts), drafts, dtype=torch.int64)
        counts = torch.zeros(len(starts), dtype=torch.int64)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            if not length:
                continue
            first: tuple[int, ...] = (int(ids[start]),)
            if options["prefix_starts"] is not None and options["prefix_lengths"][row]:
                first = (int(ids[options["prefix_starts"][row]]), *first)
            going_on = self._said[first][length : length + drafts]
            for place, token in enumerate(going_on):
                spoilt = length % 3 == 0 and place >= self._wrong
                tokens[row, place] = (token + 1) % VOCABULARY if spoilt else token
            counts[row] = len(going_on)
        return tokens.to(ids.device), counts.to(ids.device)


@contextmanager
def knowing(said: dict[tuple[int, ...], list[int]], wrong: int = 1) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "find_drafts", Oracle(said, wrong))
        yield


def distinct(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Prompts that are told apart by their first tokens."""
    found = prompts(lengths, seed)
    for index, prompt in enumerate(found):
        prompt[0] = 3 + index
    return found


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16"},
    {"precision": "fp8"},
    {"attention": STEM},
    {"attention": STEM, "precision": "fp8"},
    {"decode_lag": 2},
    {"max_live": 1},
    {"arena_tokens": 640},
]


@pytest.mark.parametrize(
    ("options", "sampled"),
    [
        *((options, False) for options in CONFIGURATIONS),
        *((options, True) for options in ({}, {"attention": STEM, "precision": "fp8"}, {"decode_lag": 2})),
    ],
    ids=str,
)
def test_outputs_are_those_of_single_steps(folder: Path, options: dict[str, Any], sampled: bool) -> None:
    """Documents of different lengths and limits together, over borders of groups and blocks, drafts right and wrong."""
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=5) if sampled else Sampling()
    lengths = [30, 200, 7, 127, 64]
    requests = [Request(str(i), prompt, NEW + 3 * i, sampling) for i, prompt in enumerate(distinct(lengths))]
    expected = tokens_of(run(make(folder, "off", **options), requests))
    said = {
        (int(request.prompt_ids[0]),): [*map(int, request.prompt_ids), *expected[request.request_id]]
        for request in requests
    }
    engine = make(folder, **options)
    with knowing(said):
        done = run(engine, requests)
    assert tokens_of(done) == expected
    assert steps_of(done) > 1.9  # two of three steps give four tokens, the third one two
    assert engine._arena.extents.largest_free == engine._arena.capacity
    assert tokens_of(run(make(folder, **options), requests)) == expected, "with drafts from the document itself"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2"])
def test_every_architecture(tmp_path: Path, architecture: str) -> None:
    """Windows, sinks, experts, LongRoPE: the drafts are read at their own places."""
    folder = save_model(tmp_path, architecture)
    requests = [Request(str(i), prompt, NEW) for i, prompt in enumerate(distinct([30, 200, 100]))]
    expected = tokens_of(run(make(folder, "off"), requests))
    said = {
        (int(request.prompt_ids[0]),): [*map(int, request.prompt_ids), *expected[request.request_id]]
        for request in requests
    }
    engine = make(folder)
    with knowing(said):
        done = run(engine, requests)
    assert tokens_of(done) == expected
    assert steps_of(done) > 1.9


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_questions_to_one_document(folder: Path, precision: str) -> None:
    prefix, *tails = distinct([320, 5, 16, 129], seed=3)  # whole units: tails begin with their own tokens
    shared = SharedPrompt(prefix, tuple(Request(str(i), tail, NEW) for i, tail in enumerate(tails)))

    def finish(engine: Engine) -> dict[str, Completion]:
        engine.add_shared(shared)
        return run(engine, [])

    expected = tokens_of(finish(make(folder, "off", precision=precision)))
    said = {
        (int(prefix[0]), int(tail[0])): [*map(int, prefix), *map(int, tail), *expected[str(i)]]
        for i, tail in enumerate(tails)
    }
    engine = make(folder, precision=precision)
    with knowing(said):
        done = finish(engine)
    assert tokens_of(done) == expected
    assert steps_of(done) > 1.9
    assert tokens_of(finish(make(folder, precision=precision))) == expected


def test_a_document_that_shares_nothing_beside_those_that_do(folder: Path) -> None:
    prefix, *tails, alone = distinct([300, 5, 16, 90], seed=3)

    def finish(engine: Engine) -> dict[str, Completion]:
        engine.add_shared(SharedPrompt(prefix, tuple(Request(str(i), tail, NEW) for i, tail in enumerate(tails))))
        return run(engine, [Request("x", alone, 2 * NEW)])

    assert tokens_of(finish(make(folder))) == tokens_of(finish(make(folder, "off")))


def test_stop_ids_within_drafts_end_the_output(folder: Path) -> None:
    """At each of the places of a step in turn; what was drafted behind is dropped."""
    prompt = distinct([50])[0]
    whole = tokens_of(run(make(folder, "off"), [Request("a", prompt, NEW)]))["a"]
    said = {(int(prompt[0]),): [*map(int, prompt), *whole]}
    ended = set()
    for place in range(1, 14):
        if whole[place] in whole[:place]:
            continue
        engine = make(folder)
        with knowing(said, wrong=DRAFTS):
            done = run(engine, [Request("a", prompt, NEW, stop_ids=(whole[place],))])["a"]
        assert (done.token_ids, done.finish_reason) == (whole[: place + 1], "stop")
        ended.add((place - 1) % (1 + DRAFTS))
    assert ended == set(range(1 + DRAFTS)), "stops at all places of a step"


@pytest.mark.parametrize("limit", range(1, 12))
def test_the_limit_of_tokens_holds(folder: Path, limit: int) -> None:
    """The extent has room for no more than prompt and limit, and its neighbour's tokens stay what they are."""
    first, second = distinct([64 - limit, 40])
    requests = [Request("a", first, limit), Request("b", second, NEW)]
    expected = tokens_of(run(make(folder, "off"), requests))
    whole = tokens_of(run(make(folder, "off"), [Request("a", first, limit + 8)]))["a"]
    said = {
        (int(first[0]),): [*map(int, first), *whole],
        (int(second[0]),): [*map(int, second), *expected["b"]],
    }
    engine = make(folder)
    with knowing(said, wrong=DRAFTS):
        done = run(engine, requests)
    assert tokens_of(done) == expected
    assert done["a"].finish_reason == "length"


def test_the_arena_holds_the_tokens_themselves(folder: Path) -> None:
    """Prompt and output, at every step, wherever drafts were wrong before."""
    prompt = distinct([30])[0]
    expected = tokens_of(run(make(folder, "off"), [Request("a", prompt, NEW)]))["a"]
    said = [*map(int, prompt), *expected]
    engine = make(folder)
    seen = []

    class Checking(Oracle):
        def __call__(self, ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, **options: Any) -> Any:
            start, length = int(starts[0]), int(lengths[0])
            seen.append(length)
            assert ids[start : start + length].tolist() == said[:length]
            return super().__call__(ids, starts, lengths, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "find_drafts", Checking({(said[0],): said}, wrong=1))
        run(engine, [Request("a", prompt, NEW)])
    assert len(seen) > 10


def test_rows_take_as_many_drafts_as_are_right() -> None:
    batch = DecodeBatch(6, torch.device("cpu"), 8)
    for row in (0, 1, 2, 3, 5):
        batch.begin(row, row_start(max_new_tokens=9, stop_ids=(4,)))
    batch.begin(3, row_start(max_new_tokens=2, stop_ids=(4,)))
    before = batch.ints.clone()
    logits = torch.zeros(6, 4, 8)
    for place, token in enumerate((1, 2, 3, 5)):
        logits[:, place, token] = 1.0
    logits[1, 1] = torch.tensor([0.0, 0, 0, 0, 9, 0, 0, 0])  # the stop token
    logits[5, 2] = torch.nan
    batch.drafts[:] = torch.tensor([[1, 2, 7], [1, 4, 3], [1, IDLE, IDLE], [1, IDLE, IDLE], [IDLE] * 3, [1, 2, 3]])
    batch.advance_verified(logits, sampled=False)
    assert batch.verified.tolist() == [
        [1, 2, 3, IDLE],  # the third draft is wrong
        [1, 4, IDLE, IDLE],  # ends in the midst of right drafts
        [1, 2, IDLE, IDLE],  # has one draft
        [1, 2, IDLE, IDLE],  # may emit two
        [IDLE] * 4,
        [1, 2, NOT_FINITE, IDLE],
    ]
    given = torch.tensor([3, 0, 2, 0, 0, 0])
    assert torch.equal(batch.ints[LENGTH], torch.where(given > 0, before[LENGTH] + given, 0))
    assert batch.ints[TOKEN].tolist()[:3] == [3, 4, 2]


def test_drafts_are_tried_while_they_pay_and_seldom_where_they_do_not() -> None:
    policy = LookupPolicy(pays=1.2)
    good, bad = policy.new_gain(), policy.new_gain()
    assert EXPECTED > 1, "a new document begins with drafts"
    steps = []
    for _ in range(2000):
        steps.append(policy.drafts([bad]))
        if steps[-1]:
            bad.note(1)
    assert steps[0] == DRAFTS
    assert 20 <= sum(map(bool, steps)) <= 45, "after some trials, one in LONGEST_PAUSE"
    assert sum(map(bool, steps[-4 * LONGEST_PAUSE :])) <= 4
    for _ in range(LONGEST_PAUSE + 1):
        if policy.drafts([bad]):
            bad.note(1 + DRAFTS)
            break
    assert policy.drafts([bad]) == DRAFTS, "one good trial is enough"
    good.note(4)
    assert policy.drafts([good, *(policy.new_gain() for _ in range(3))]) == DRAFTS
    waiting = [Gain(1.0), Gain(1.0)]
    assert [policy.drafts(waiting) for _ in range(FIRST_PAUSE + 1)] == [0] * FIRST_PAUSE + [DRAFTS]


def test_the_choice_of_steps_changes_no_output(folder: Path) -> None:
    """With random weights, as an engine comes: plain steps and some with drafts between them."""
    requests = [Request(str(i), prompt, 120) for i, prompt in enumerate(prompts([30, 200, 7]))]
    expected = tokens_of(run(make(folder, "off"), requests))
    for lag in (0, 2):
        engine = make(folder, decode_lag=lag)
        engine._lookup = LookupPolicy(pays=1.5)
        keys: list[StepKey] = []
        launch = engine._decode.run

        def noted(key: StepKey, keys: Any = keys, launch: Any = launch) -> None:
            keys.append(key)
            launch(key)

        engine._decode.run = noted  # type: ignore[method-assign]
        assert tokens_of(run(engine, requests)) == expected
        assert {key.drafts for key in keys} == {0, DRAFTS}


def test_a_model_with_states_runs_without(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_models, "ARCHITECTURES", HYBRIDS)
        save_model(tmp_path, "qwen3_5")
    engine = Engine(EngineConfig(str(tmp_path), device="cpu", arena_tokens=1024, prompt_lookup="auto"))
    assert engine._lookup is None
    assert any("prompt lookup is off" in note for note in engine.describe()["notes"])
    assert engine.describe()["prompt_lookup"] == "off"


def test_the_reader_quotes(tmp_path: Path) -> None:
    """The bundled model on a report of its kind: fewer steps, the same words."""
    text = (TINY_READER.parents[1] / "examples/documents/report-01.txt").read_text()
    tokenizer = Tokenizer.from_file(str(TINY_READER / "tokenizer.json"))
    ids = tokenizer.encode(text[:6000] + "\n\nList the key findings.\n").ids
    requests = [Request("a", ids, 64), Request("b", ids[: len(ids) // 2], 64)]
    plain = run(make(TINY_READER, "off"), requests)
    done = run(make(TINY_READER), requests)
    assert tokens_of(done) == tokens_of(plain)
    assert steps_of(plain) == 1.0
    assert steps_of(done) > 1.2
