"""The engine's parts on their own: extents, waiting line, buckets, random numbers, sampling, caches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.engine.config import Request
from pipeline.engine.document import OVERTAKES, Document, WaitingLine
from pipeline.engine.kv.arena import ALIGNMENT, Arena, Extent, ExtentAllocator, LayerShape
from pipeline.engine.kv.cache import DecodeCache, PrefillCache
from pipeline.engine.run.batch import IDLE, LENGTH, MAX_STOP_IDS, NOT_FINITE, DecodeBatch, RowStart
from pipeline.engine.run.decode import Readback, batch_bucket
from pipeline.engine.run.sampling import document_seed, penalise, sample, uniforms


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60))
def test_extents_never_overlap_and_all_come_back(actions: list[tuple[bool, int]]) -> None:
    allocator = ExtentAllocator(2048)
    held: list[Extent] = []
    for give_back, tokens in actions:
        if give_back and held:
            allocator.release(held.pop(tokens % len(held)))
        else:
            largest = allocator.largest_free
            extent = allocator.allocate(tokens)
            assert (extent is not None) == (largest >= tokens)
            if extent is not None:
                assert extent.tokens >= tokens
                assert extent.start % ALIGNMENT == 0
                held.append(extent)
        ends = sorted((e.start, e.start + e.tokens) for e in held)
        assert all(a[1] <= b[0] for a, b in pairwise(ends))
        assert allocator.free_tokens + sum(e.tokens for e in held) == 2048
    for extent in held:
        allocator.release(extent)
    assert allocator.largest_free == 2048


def test_extent_errors() -> None:
    allocator = ExtentAllocator(256)
    extent = allocator.allocate(100)
    assert extent == Extent(0, 128)
    allocator.release(extent)
    with pytest.raises(ValueError, match="free already"):
        allocator.release(extent)
    with pytest.raises(ValueError, match="outside"):
        allocator.release(Extent(192, 128))
    assert allocator.allocate(257) is None


def waiting(*needs: int) -> tuple[WaitingLine, list[Document]]:
    line = WaitingLine()
    documents = [Document(Request(str(i), [], 1), np.zeros(need - 1, dtype=np.int64)) for i, need in enumerate(needs)]
    for document in documents:
        line.append(document)
    return line, documents


def test_shorter_document_overtakes_a_bounded_number_of_times() -> None:
    line, documents = waiting(1000, *[100] * (OVERTAKES + 5))
    for i in range(OVERTAKES):
        assert line.take(500) is documents[i + 1]
    assert line.take(500) is None
    assert line.take(1024) is documents[0]
    assert line.take(500) is documents[OVERTAKES + 1]


def test_batch_bucket() -> None:
    assert [batch_bucket(n, 12) for n in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]


def splitmix64(seed: int, step: int) -> float:
    """The published generator on unsigned 64-bit integers."""
    mask = (1 << 64) - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_uniforms_are_splitmix64() -> None:
    seeds = torch.tensor([document_seed(7, f"document {i}") for i in range(50)])
    steps = torch.arange(50) * 37
    expected = [splitmix64(int(seed) % (1 << 64), int(step)) for seed, step in zip(seeds, steps, strict=True)]
    assert uniforms(seeds, steps).tolist() == expected
    many = uniforms(seeds[:1].expand(20_000), torch.arange(20_000))
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(many.var() - 1 / 12) < 0.002


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0]).expand(20_000, 4)
    draws = uniforms(torch.full((20_000,), 3), torch.arange(20_000))
    temperature, full = torch.full((20_000,), 0.7), torch.ones(20_000)
    every = torch.zeros(20_000, dtype=torch.int64)
    shares = torch.bincount(sample(logits, temperature, full, every, 0 * full, draws), minlength=4) / 20_000
    expected = torch.softmax(logits[0] / 0.7, dim=-1)
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)
    # Tokens 1 and 3 hold 0.90 of the probability: with top_p 0.8 nothing else comes, in their proportion.
    kept = torch.bincount(sample(logits, temperature, full * 0.8, every, 0 * full, draws), minlength=4) / 20_000
    assert kept[0] == kept[2] == 0
    torch.testing.assert_close(kept[1], expected[1] / (expected[1] + expected[3]), atol=0.012, rtol=0)


def test_sample_edges() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 3.0], [5.0, 0.0, 0.0]])
    almost_one = torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)
    hot, one, ks = torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    assert sample(logits, 0 * hot, one, ks, 0 * one, almost_one).tolist() == [0, 1, 0], (
        "temperature 0 is the argmax, lower id first"
    )
    assert sample(logits, hot, one, ks, 0 * one, 0 * almost_one).tolist() == [0, 1, 0], (
        "the first draw is the most likely token"
    )
    assert sample(logits, hot, one * 1e-6, ks, 0 * one, almost_one).tolist() == [0, 1, 0], (
        "a tiny top_p keeps one token"
    )
    assert sample(logits, hot, one, ks, 0 * one, almost_one).tolist() == [2, 0, 2], (
        "the last draw is the least likely token"
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *((1, 1.0, 0.0), (3, 1.0, 0.0), (3, 0.8, 0.0), (5, 0.5, 0.0), (8, 0.9, 0.0), (99, 0.9, 0.0)),
        *((99, 1.0, 0.15), (99, 1.0, 1.0), (99, 0.9, 0.3), (3, 1.0, 0.1), (5, 0.95, 0.2)),
    ],
)
def test_top_k_top_p_and_min_p_follow_transformers(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 1.4, -0.2, 0.9, 0.1])
    scores = TemperatureLogitsWarper(0.7)(None, logits[None])
    scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
    expected = MinPLogitsWarper(min_p)(None, scores).softmax(-1)[0]
    rows = 20_000
    draws = uniforms(torch.full((rows,), 3), torch.arange(rows))
    ks = torch.full((rows,), top_k)
    temperatures, top_ps, min_ps = (torch.full((rows,), value) for value in (0.7, top_p, min_p))
    tokens = sample(logits.expand(rows, 8), temperatures, top_ps, ks, min_ps, draws)
    shares = torch.bincount(tokens, minlength=8) / rows
    assert (shares > 0).tolist() == (expected > 0).tolist()
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)


def test_rows_of_one_step_have_their_own_min_p() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0]).expand(4, 4)
    draws = torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)
    ks = torch.zeros(4, dtype=torch.int64)
    least = torch.tensor([0.0, 0.2, 0.5, 0.0])
    assert sample(logits, torch.ones(4), torch.ones(4), ks, least, draws).tolist() == [0, 2, 3, 0]


def test_penalties_are_those_of_transformers() -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids = torch.tensor([[0, 31, 32, 63, 64], [69, 5, 5, 31, 30], [1, 2, 3, 4, 5]])
    batch = DecodeBatch(4, torch.device("cpu"), 70)
    penalties = [1.3, 0.7, 1.0]
    for row, penalty in enumerate(penalties):
        batch.begin(row + 1, row_start(repetition_penalty=penalty, prompt_ids=ids[row].numpy()))
    got = penalise(logits, batch.seen[1:], batch.floats[3, 1:])
    for row, penalty in enumerate(penalties):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids[row : row + 1], logits[row : row + 1].float().clone())
        assert torch.equal(got[row : row + 1], wanted)


def test_rows_of_one_step_have_their_own_top_k() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0]).expand(4, 4)
    draws = torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)
    ks = torch.tensor([0, 1, 2, 3])
    assert sample(logits, torch.ones(4), torch.ones(4), ks, torch.zeros(4), draws).tolist() == [0, 1, 3, 2]


def row_start(**changes: object) -> RowStart:
    values = {"extent": Extent(64, 64), "prompt_tokens": 10, "max_new_tokens": 3, "seed": 1, "stop_ids": (4,)}
    return RowStart(**(values | {"temperature": 0.0, "top_p": 1.0} | changes))  # type: ignore[arg-type]


def test_rows_stop_by_themselves() -> None:
    batch = DecodeBatch(4, torch.device("cpu"), 6)
    batch.begin(0, row_start())
    batch.begin(1, row_start(max_new_tokens=1))
    batch.begin(3, row_start())
    logits = torch.zeros(4, 6)
    logits[:, 2] = 1.0
    batch.advance(logits, 0, sampled=False)
    assert batch.report.tolist() == [2, 2, IDLE, 2]
    assert batch.ints[LENGTH].tolist() == [11, 0, 0, 11], "row 1 reached its limit"
    logits[0, 4] = 2.0
    logits[3, 0] = torch.nan
    batch.advance(logits, 0, sampled=False)
    assert batch.report.tolist() == [4, IDLE, IDLE, NOT_FINITE]
    assert batch.ints[LENGTH].tolist() == [0, 0, 0, 0], "a stop token and a NaN end rows 0 and 3"
    before = batch.ints.clone()
    batch.advance(torch.ones(4, 6), 0, sampled=True)
    assert batch.report.tolist() == [IDLE] * 4
    assert torch.equal(batch.ints[LENGTH], before[LENGTH])


def test_a_moved_row_goes_on() -> None:
    batch = DecodeBatch(3, torch.device("cpu"), 6)
    batch.begin(2, row_start(temperature=0.5, min_p=0.25, repetition_penalty=1.5, prompt_ids=np.array([2, 5])))
    expected = batch.ints[:, 2].clone()
    batch.move(2, 0)
    assert torch.equal(batch.ints[:, 0], expected)
    assert batch.floats[:, 0].tolist() == [0.5, 1.0, 0.25, 1.5]
    assert batch.seen[0].tolist() == [0b100100]
    assert batch.ints[LENGTH].tolist() == [10, 0, 0]
    with pytest.raises(ValueError, match="stop ids"):
        batch.begin(0, row_start(stop_ids=tuple(range(MAX_STOP_IDS + 1))))


def test_caches_write_in_place_and_only_there() -> None:
    arena = Arena(
        {0: LayerShape(2, 8, 8), 5: LayerShape(1, 4, 6)}, 256, torch.float32, dict.fromkeys((0, 5), torch.device("cpu"))
    )
    for tensor in arena.tensors():
        tensor.fill_(torch.nan)
    extent = Extent(64, 128)
    k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    seen_k, _ = PrefillCache(arena, extent, seen=0, tokens=k.shape[2]).update(k, v, 0)
    assert torch.equal(seen_k, k)
    more = torch.randn(1, 2, 2, 8)
    _, seen_v = PrefillCache(arena, extent, seen=3, tokens=more.shape[2]).update(more, more, 0)
    assert torch.equal(seen_v, torch.cat([v, more], dim=2))
    assert seen_v.data_ptr() == arena.v[0][:, 64:].data_ptr()
    assert arena.k[0].isnan().sum() == arena.k[0].numel() - 2 * 5 * 8

    slots = torch.tensor([69, arena.scratch])
    token = torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 6)
    all_k, all_v = DecodeCache(arena, slots).update(*token, 5)
    assert all_k.shape == (1, 1, 256 + ALIGNMENT, 4)
    assert torch.equal(all_v[0, 0, slots], token[1][:, 0, 0])
    assert arena.v[5].isnan().sum() == arena.v[5].numel() - 2 * 6


def test_cache_names_what_it_lacks() -> None:
    cache = DecodeCache(Arena({}, 64, torch.float32, {}), torch.zeros(1, dtype=torch.int64))
    assert not hasattr(cache, "is_sliding")
    with pytest.raises(AttributeError, match="conv_states"):
        _ = cache.conv_states


def test_readback_keeps_order_and_bounds() -> None:
    readback: Readback[str] = Readback(4, 2, torch.device("cpu"))
    report = torch.tensor([[1, 2], [3, 4]])
    readback.push(report[:1], "first")
    report += 10
    readback.push(report, "second")
    with pytest.raises(RuntimeError, match="pop one first"):
        readback.push(report, "third")
    assert readback.pop() == ([[1, 2]], "first")
    assert readback.pop() == ([[11, 12], [13, 14]], "second")
    assert len(readback) == 0
