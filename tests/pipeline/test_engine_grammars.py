"""Outputs that follow a grammar: all valid, the same in any company, and neighbours without one not touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import TINY_READER, run, save_model
from schemas import SCHEMAS, grammar, tokens
from test_engine_lookup import STEM, knowing

from pipeline.answers.grammar import Grammar, Matcher
from pipeline.answers.schema import AnswerError, compile_schema
from pipeline.engine import Engine, EngineConfig, Request, Sampling
from pipeline.engine.kv.arena import Extent
from pipeline.engine.run.batch import DecodeBatch, RowStart
from pipeline.engine.run.lookup import LookupPolicy
from pipeline.engine.run.masks import Constraint, TokenMasks

NEW = 120
WARM = Sampling(temperature=1.5, seed=3)


def make(**options: Any) -> Engine:
    defaults: dict[str, Any] = {"device": "cpu", "arena_tokens": 8192, "grammars": True}
    return Engine(EngineConfig(str(TINY_READER), **(defaults | options)))


def prompt(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(20, 2000, size=5 + 7 * (i % 9))


def request(i: int, name: str | None, sampling: Sampling = WARM, new: int = NEW) -> Request:
    return Request(f"{i}-{name}", prompt(i), new, sampling, grammar=None if name is None else grammar(name))


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """Some outputs without a grammar, of an engine that knows of none."""
    engine = make(grammars=False)
    found = run(engine, [request(i, None, s, 40) for i, s in ((1, WARM), (4, Sampling()))])
    engine.close()
    return {name: done.token_ids for name, done in found.items()}


@pytest.mark.parametrize("lag", [0, 2])
def test_a_hundred_answers_are_valid_and_neighbours_keep_their_tokens(alone: dict[str, list[int]], lag: int) -> None:
    engine = make(max_live=7, decode_lag=lag)
    asked = [request(i, name) for i in range(18) for name in SCHEMAS]
    asked[3:3] = [request(1, None, WARM, 40)]
    asked[30:30] = [request(4, None, Sampling(), 40)]
    done = run(engine, asked)
    valid = 0
    seen: dict[str, set[str]] = {}
    for name, completion in done.items():
        _, _, kind = name.partition("-")
        if kind == "None":
            assert completion.token_ids == alone[name]
            continue
        assert (completion.status, completion.finish_reason) == ("ok", "stop"), completion
        text = tokens().decode(list(completion.token_ids))
        assert not isinstance(compile_schema(SCHEMAS[kind]).parse(text), AnswerError), text
        seen.setdefault(kind, set()).add(text)
        valid += 1
    assert valid == 108
    assert len(alone) == 2
    assert min(map(len, seen.values())) >= 3, "a grammar that leaves no choice would show nothing"


def test_an_answer_does_not_depend_on_its_company() -> None:
    engine = make(max_live=5)
    asked = [request(i, name, s) for i, name in enumerate(SCHEMAS) for s in (WARM,)]
    together = run(engine, asked)
    for each in reversed(asked):
        assert run(engine, [each])[each.request_id].token_ids == together[each.request_id].token_ids


def test_greedy_answers_take_the_likeliest_token_that_may_come() -> None:
    """By the same model asked for one token more at a time, masked here by llguidance's own bytes."""
    engine = make()
    ids = run(engine, [request(2, "flat", Sampling())])["2-flat"].token_ids
    matcher = grammar("flat").matcher()
    for step, token in enumerate(ids):
        allowed = np.frombuffer(matcher.raw.compute_logit_bias(), np.uint8) > 0
        before = np.concatenate([prompt(2), ids[:step]]).astype(np.int64)
        logits = last_logits(engine, before)
        assert token == int(np.where(allowed[: len(logits)], logits, -np.inf).argmax())
        matcher.take(token)


def last_logits(engine: Engine, ids: np.ndarray) -> np.ndarray:
    from engine_models import last_logits as of_prompt

    return of_prompt(engine, ids)[0].numpy()


def test_what_is_cut_ends_by_length() -> None:
    done = run(make(), [request(0, "nested", WARM, 3)])["0-nested"]
    assert (done.status, done.finish_reason, done.output_tokens) == ("ok", "length", 3)


def test_stop_tokens_come_only_where_the_answer_is_complete() -> None:
    """A letter that is a stop token would end "yes" behind its y."""
    engine = make()
    letters = tuple(tokens().encode_data("e").tolist())
    done = run(engine, [Request("a", prompt(0), NEW, WARM, stop_ids=letters, grammar=grammar("choice"))])["a"]
    assert done.status == "ok"
    text = tokens().decode([token for token in done.token_ids if token not in letters])
    assert text.startswith('"'), text


@pytest.mark.parametrize("sampling", [WARM, Sampling()], ids=["sampled", "greedy"])
@pytest.mark.parametrize("stem", [False, True])
def test_answers_with_drafts_are_those_of_single_steps(sampling: Sampling, stem: bool) -> None:
    """Drafts right and wrong, some behind the answer's end; beside an output without a grammar."""
    options: dict[str, Any] = {"max_live": 3, "attention": STEM if stem else None}
    asked = [request(i, name, sampling) for i, name in enumerate([*SCHEMAS, None, *SCHEMAS])]
    for i, each in enumerate(asked):
        each.prompt_ids[0] = 3 + i  # what the oracle knows them by
    expected = run(make(**options), asked)
    said = {
        (int(each.prompt_ids[0]),): [*map(int, each.prompt_ids), *expected[each.request_id].token_ids, 60, 61, 62]
        for each in asked
    }
    engine = make(prompt_lookup="auto", **options)
    engine._lookup = LookupPolicy(pays=0.0)  # every step verifies drafts
    with knowing(said):
        known = run(engine, asked)
    own = run(engine, asked)
    for name, completion in expected.items():
        assert completion.status == "ok"
        for found in (known[name], own[name]):
            assert (found.token_ids, found.finish_reason) == (completion.token_ids, completion.finish_reason), name
    assert np.mean([each.tokens_per_step for each in known.values()]) > 1.9


def test_a_request_with_a_grammar_needs_an_engine_for_it() -> None:
    done = run(make(grammars=False), [request(0, "choice")])["0-choice"]
    assert done.status == "error"
    assert "grammars=True" in done.error


def test_a_matcher_that_fails_ends_its_own_document_alone(alone: dict[str, list[int]]) -> None:
    class Failing(Matcher):
        taken = 0

        def take(self, token: int) -> None:
            self.taken += 1
            super().take(0 if self.taken == 3 else token)  # no answer holds this token

    class Broken(Grammar):
        def __init__(self) -> None:
            pass

        def matcher(self) -> Matcher:
            whole = grammar("flat").matcher()
            return Failing(whole.raw, whole.words, [])

    asked = [request(1, None, WARM, 40), Request("x", prompt(0), NEW, WARM, grammar=Broken()), request(3, "list")]
    done = run(make(), asked)
    assert done["x"].status == "error"
    assert "cannot go on by its grammar" in done["x"].error
    assert done["3-list"].status == "ok"
    assert done["1-None"].token_ids == alone["1-None"]


def test_an_ended_outputs_matcher_serves_the_next() -> None:
    """It knows most states already; it must be as new, and nobody else's. One that failed serves nobody."""
    mine = Grammar(json.dumps(SCHEMAS["flat"]), tokens().tokenizer)
    first, second = mine.matcher(), mine.matcher()
    assert first.raw is not second.raw
    fresh, raw = first.raw.compute_logit_bias(), first.raw
    for token in tokens().encode_data('{"').tolist():
        first.take(token)
    assert first.raw.compute_logit_bias() != fresh
    first.close()
    again = mine.matcher()
    assert again.raw is raw
    assert again.raw.compute_logit_bias() == fresh
    second.take(0)  # no answer begins so
    assert second.error
    broken = second.raw
    second.close()
    assert mine.matcher().raw is not broken

    engine = make(max_live=2)
    run(engine, [Request(str(i), prompt(i), NEW, WARM, grammar=mine) for i in range(6)])
    engine.add(Request("aborted", prompt(0), NEW, WARM, grammar=mine))
    engine.step()
    engine.abort("aborted")
    assert len(mine._free) == 2, "as many as ran at once"


def test_a_vocabulary_larger_than_the_tokenizers(tmp_path: Path) -> None:
    """Models pad their vocabulary: what the tokenizer does not know never comes. The model is random."""
    folder = save_model(tmp_path, "llama", vocab_size=2117, eos_token_id=4)
    engine = Engine(EngineConfig(str(folder), device="cpu", arena_tokens=8192, grammars=True))
    asked = [request(i, name) for i in range(3) for name in SCHEMAS]
    for name, completion in run(engine, asked).items():
        assert completion.finish_reason == "stop", completion
        parsed = compile_schema(SCHEMAS[name.partition("-")[2]]).parse(tokens().decode(list(completion.token_ids)))
        assert not isinstance(parsed, AnswerError)


@pytest.mark.parametrize("sampled", [False, True])
def test_no_draw_takes_a_masked_token(sampled: bool) -> None:
    """Rows side by side, of which one is masked down to a few unlikely tokens: only it changes."""
    batch = DecodeBatch(3, torch.device("cpu"), 100)
    for row in range(3):
        batch.begin(row, RowStart(Extent(0, 64), 4, 8, row, (2,), 1.0, 1.0))
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    logits[1, :4] = -40.0
    masks = torch.zeros(3, 5, dtype=torch.int32)
    masks[1] = torch.tensor([0b1011, 0, 0, 0, 1])
    twin = DecodeBatch(3, torch.device("cpu"), 100)
    twin.ints.copy_(batch.ints)
    twin.floats.copy_(batch.floats)
    twin.advance(logits.clone(), 0, sampled)
    batch.advance(logits.clone(), 0, sampled, masks)
    assert batch.report[[0, 2]].tolist() == twin.report[[0, 2]].tolist()
    assert batch.report[1] in (0, 1, 3)
    assert batch.report[1] != twin.report[1]


def test_masks_are_cleared_for_rows_that_have_none_any_more() -> None:
    masks = TokenMasks(2, 2048, torch.device("cpu"))
    constraint = Constraint(grammar("choice").matcher(), (4, 9))
    masks.send({0: constraint}, range(2))
    assert masks.device[:, -1].tolist() == [1, 0]
    assert masks.device[0, 0] & (1 << 4 | 1 << 9) == 0, "the answer is not complete"
    constraint.matcher.raw.consume_tokens(tokens().encode_data('"yes"').tolist())
    masks.send({1: constraint}, range(2))
    assert masks.device[:, -1].tolist() == [0, 1]
    assert masks.device[1, 0] == 1 << 4 | 1 << 9
