"""The time left: of simulated jobs of several kinds, of a job that was recorded, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from result_rows import make_row

from pipeline.engine.config import SoFar
from pipeline.job.time_left import TimeLeft, _line
from pipeline.results.rows import Row

MOST, CHUNK, BYTES = 256, 2048, 4


def row(name: str, read: int, written: int, prefill: float, decode: float) -> Row:
    return make_row(
        name, "d.txt", prompt_tokens=read, output_tokens=written, prefill_seconds=prefill, decode_seconds=decode
    )


@dataclass
class Doc:
    name: str
    tokens: int
    output: int
    read: int = 0
    written: int = 0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def so_far(self) -> SoFar:
        return SoFar(self.read, self.written, self.prefill * (self.written > 0), self.decode, self.tokens * BYTES)


class Worker:
    """Reads a chunk when it has a slot for a document, then does a decode step; two documents wait in it."""

    def __init__(self, slots: int) -> None:
        self.slots, self.now = slots, 0.0
        self.held: list[Doc] = []

    def step(self) -> list[Doc]:
        live = [doc for doc in self.held if doc.written]
        begun = next((doc for doc in self.held if not doc.written), None)
        if begun is not None and len(live) < self.slots:
            chunk = min(CHUNK, begun.tokens - begun.read)
            seconds = 2e-5 * chunk + 1e-10 * ((begun.read + chunk) ** 2 - begun.read**2)
            begun.read, begun.prefill, self.now = begun.read + chunk, begun.prefill + seconds, self.now + seconds
            if begun.read == begun.tokens:
                begun.written = 1
                live.append(begun)
        if live:
            seconds = 5e-3 + 2.6e-8 * sum(doc.tokens for doc in live)
            self.now += seconds
            for doc in live:
                doc.written, doc.decode = doc.written + 1, doc.decode + seconds
        self.held = [doc for doc in self.held if doc.written < doc.output]
        return [doc for doc in live if doc.written >= doc.output]


def simulated(
    lengths: Sequence[int], outputs: Sequence[int], workers: int, slots: int
) -> list[tuple[float, Any, bool]]:
    """(seconds since the start, estimate, whether it is a bound) at each look, and (seconds, 0, False) at the end."""
    waiting = [Doc(str(at), n, outputs[at]) for at, n in enumerate(sorted(lengths))]  # the last one is the longest
    sizes = {doc.name: doc.tokens * BYTES for doc in waiting}
    engines = [Worker(slots) for _ in range(workers)]
    time_left, told, now, look = TimeLeft(MOST), [], 0.0, 0.0
    while sizes:
        while waiting and len((least := min(engines, key=lambda each: len(each.held))).held) < slots + 2:
            least.now = max(least.now, now if not least.held else 0.0)
            least.held.append(waiting.pop())
        engine = min((each for each in engines if each.held), key=lambda each: each.now)
        time_left.passed(workers * max(0.0, engine.now - now))
        now = max(now, engine.now)
        if now >= look:
            work = {doc.name: doc.so_far for each in engines for doc in each.held}
            seconds = time_left.seconds(len(sizes), sum(sizes.values()), work.values(), workers)
            told.append((now, seconds, time_left.is_bound))
            look += 0.1
        for doc in engine.step():
            time_left.add([row(doc.name, doc.tokens, doc.output, doc.prefill, doc.decode)], sizes.pop(doc.name))
    return [*told, (max(each.now for each in engines), 0, False)]


RANDOM = np.random.default_rng(3)
EVEN = np.clip(RANDOM.normal(150, 25, 400), 5, MOST).astype(int).tolist()
LONGEST = [MOST] * 400
KINDS: dict[str, tuple[Any, list[int], int, int]] = {
    "few long": (RANDOM.integers(30_000, 130_000, 24), EVEN, 1, 8),
    "many short": (RANDOM.integers(1000, 4000, 400), EVEN, 1, 32),
    "all in work at once": (RANDOM.integers(10_000, 60_000, 24), LONGEST, 1, 32),
    "very mixed lengths": (np.clip(RANDOM.lognormal(9.4, 1.2, 100), 64, 130_000).astype(int), EVEN, 1, 16),
    "four workers": (np.clip(RANDOM.lognormal(9.9, 1.0, 200), 64, 130_000).astype(int), EVEN, 4, 8),
    "four workers, long outputs": (np.clip(RANDOM.lognormal(9.9, 1.0, 200), 64, 130_000).astype(int), LONGEST, 4, 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_jobs(kind: str) -> None:
    """Too long rather than too short, most where lengths are mixed: few documents decode together while long ones are
    read, and nothing tells that more will.
    """
    lengths, outputs, workers, slots = KINDS[kind]
    *told, (end, _, _) = simulated([int(n) for n in lengths], outputs, workers, slots)
    ratios = [(at / end, seconds / (end - at)) for at, seconds, _ in told if seconds is not None]
    assert ratios[0][0] < 0.1, "told soon, also where all are in work at once"
    middle = [ratio for part, ratio in ratios if 1 / 3 < part < 0.8]
    assert 0.95 < np.median(middle) < 1.2
    assert 0.9 < min(middle) < max(middle) < 1.4
    assert {is_bound for at, _, is_bound in told if at > 0.75 * end} == {False}


# Of 24 documents that SmolLM2-135M summarised on one core, 4 together, outputs cut at 250 tokens: seconds at which each
# was done, its bytes, tokens of prompt and output, seconds of prefill and decoding. Five more were not noted.
JOB_SECONDS, JOB_DOCUMENTS, JOB_BYTES = 169.4, 24, 82_050
RECORDED = [
    (31.7, 10268, 2196, 84, 8.68, 8.64), (35.3, 5967, 1294, 90, 4.65, 9.23), (49.5, 5113, 1151, 79, 4.90, 9.30),
    (58.8, 7784, 1666, 38, 6.01, 3.27), (65.5, 4865, 1073, 250, 3.60, 26.04), (65.5, 6123, 1323, 250, 4.59, 26.04),
    (76.6, 4456, 971, 250, 4.52, 24.31), (88.3, 3313, 706, 250, 2.42, 21.15), (94.6, 3378, 745, 250, 2.37, 20.76),
    (94.6, 2636, 606, 250, 1.88, 20.76), (98.5, 2149, 468, 10, 1.39, 0.73), (101.7, 2792, 760, 68, 2.44, 5.60),
    (109.8, 2340, 542, 250, 1.67, 20.86), (114.3, 2525, 590, 114, 2.07, 9.50), (126.8, 2524, 558, 250, 1.85, 21.66),
    (129.8, 3928, 886, 250, 2.90, 21.63), (134.5, 1127, 362, 67, 1.27, 5.19), (137.5, 1596, 388, 250, 1.24, 21.35),
    (141.7, 1093, 276, 250, 1.04, 21.33),
]  # fmt: skip
# Then workers held so many, of which so many tokens were read and written.
READINGS: dict[float, tuple[int, list[tuple[int, int]]]] = {
    30.5: (6, [(2196, 69), (1073, 69), (1323, 69), (1294, 69), (0, 0), (0, 0)]),
    72.9: (6, [(971, 182), (706, 61), (745, 16), (606, 16), (0, 0), (0, 0)]),
    101.4: (6, [(542, 176), (760, 55), (558, 10), (512, 0), (0, 0), (0, 0)]),
    144.1: (5, [(414, 101), (469, 57), (289, 40), (320, 0), (0, 0)]),
}


def test_a_recorded_job_whose_outputs_become_longer() -> None:
    """Nothing tells at first that later outputs are longer: it is told too short then, and before, as a bound."""
    known = {measured[0]: (size, measured) for _, size, *measured in RECORDED}
    other = (JOB_BYTES - sum(each[1] for each in RECORDED)) / (JOB_DOCUMENTS - len(RECORDED))
    time_left, before, done, ratios = TimeLeft(250), 0.0, set[int](), []
    for at, (_, readings) in READINGS.items():
        for second, size, *measured in RECORDED:
            if before < second <= at:
                done.add(measured[0])
                time_left.add([row(str(measured[0]), *measured)], size)  # type: ignore[arg-type]
        work = []
        for read, written in readings:
            size, measured = known.get(read, (round(other), [read, 0, read / 260, 0.0]))
            work.append(SoFar(read, written, measured[2] if written else 0.0, 0.087 * written, size))
        time_left.passed(at - before)
        sizes = [each[1] for each in RECORDED if each[2] not in done]
        left = JOB_DOCUMENTS - len(done)
        seconds = time_left.seconds(left, round(sum(sizes) + (left - len(sizes)) * other), work, 1)
        assert seconds is not None
        assert time_left.is_bound == (not done)
        ratios.append(seconds / (JOB_SECONDS - at))
        before = at
    assert ratios == pytest.approx([1.17, 0.72, 0.82, 0.82], abs=0.03)


def learnt(documents: int, decode_seconds: float = 5.0, read_seconds: float = 10.0, waited: float = 0.0) -> TimeLeft:
    """Of documents that were done one after another: 4,000 bytes, 1,000 tokens that were read, and 100 written ones."""
    time_left = TimeLeft(256)
    time_left.passed(documents * (read_seconds + decode_seconds + waited))
    for at in range(documents):
        time_left.add([row(str(at), 1000, 100, read_seconds, decode_seconds)], 4000)
    return time_left


def test_read_and_written_tokens_are_priced_apart() -> None:
    time_left = learnt(2)
    assert time_left.seconds(1, 400_000, [], 1) == pytest.approx(1000 + 5), "long, its output like others"
    assert time_left.seconds(100, 4000, [], 1) == pytest.approx(10 + 500), "short, each with an output"
    assert time_left.seconds(100, 4000, [], 4) == pytest.approx((10 + 500) / 4)
    assert time_left.seconds(1, 400_000, [], 4) == pytest.approx(1000 + 5), "one worker alone has it"


def test_what_is_done_of_documents_in_work_is_not_left() -> None:
    time_left = learnt(2)
    time_left.passed(5.0)
    assert time_left.seconds(1, 4000, [SoFar(500, 0, 0.0, 0.0, 4000)], 1) == pytest.approx(5 + 5)
    time_left.passed(5 + 4.0)
    output = (2 * 100 + 80) / 2.5  # one that goes on is half-way, as far as anybody knows
    assert time_left.seconds(1, 4000, [SoFar(1000, 80, 10.0, 4.0, 4000)], 1) == pytest.approx((output - 80) * 0.05)


def test_a_prompt_that_is_read_tells_before_its_output_begins() -> None:
    time_left = learnt(2)
    time_left.passed(40.0)
    assert time_left.seconds(2, 8000, [SoFar(1000, 0, 40.0, 0.0, 4000)], 1) == pytest.approx(20 + 2 * 5)


def test_short_prompts_are_cheaper_by_the_token() -> None:
    """Documents of 3,000 and 1,000 tokens took 5 and 3 ms for each: those of 2,000 take 4, of 500 take 2.5."""
    time_left = TimeLeft(256)
    time_left.passed(18.0)
    time_left.add([row("a", 3000, 1, 15.0, 0.0)], 12_000)
    time_left.add([row("b", 1000, 1, 3.0, 0.0)], 4000)
    assert time_left.seconds(10, 80_000, [], 1) == pytest.approx(80)
    assert time_left.seconds(10, 20_000, [], 1) == pytest.approx(12.5)


def test_several_that_decode_together_share_steps() -> None:
    time_left = TimeLeft(100)
    work = [SoFar(1000, 50, 1.0, 5.0, 4000)] * 8
    time_left.passed(8 + 5.0)
    assert time_left.seconds(8, 32_000, work, 1) == pytest.approx(5), "as long as they may be"
    assert time_left.is_bound
    time_left.passed(3.0)
    for name in "abcdefgh":
        time_left.add([row(name, 1000, 80, 1.0, 8.0)], 4000)
    assert not time_left.is_bound
    assert time_left.seconds(80, 320_000, [], 1) == pytest.approx(80 + 80), "ten times eight"


def test_the_last_ones_wait_for_the_longest() -> None:
    time_left = learnt(30)
    work = [SoFar(1000, 1, 10.0, 0.05, 4000)] * 2
    time_left.passed(20 + 0.05)
    seconds = time_left.seconds(2, 8000, work, 1)
    assert seconds is not None
    assert 1.1 * 5 < seconds < 2 * 5, "both together take 5 seconds, if they are alike"


def test_time_in_which_workers_waited_is_to_come_again() -> None:
    """For texts to be taken out of PDF files, say."""
    waiting = [SoFar(0, 0, 0.0, 0.0, 4000)] * 2
    assert learnt(1, waited=15.0).seconds(2, 8000, waiting, 1) == pytest.approx(2 * 30)


def test_several_questions_to_a_document_are_answered_side_by_side() -> None:
    def row_of(shared: int) -> Row:
        return make_row(
            "a", "d", prompt_tokens=1000, prefix_tokens=shared, output_tokens=100, prefill_seconds=10.0 * (not shared),
            decode_seconds=5.0,
        )  # fmt: skip

    time_left = TimeLeft(512)
    for _ in range(30):
        time_left.passed(10 + 5.0)
        time_left.add([row_of(0), row_of(1000)], 4000)
    assert time_left.seconds(1, 4000, [], 1) == pytest.approx(10 + 5)
    time_left.passed(20 + 0.05)
    output = (30 * 200 + 2 * 2) / 31
    longer = output * np.log(2) / 2  # of the two outputs that a document has at once
    found = time_left.seconds(2, 8000, [SoFar(1000, 2, 10.0, 0.1, 4000)] * 2, 1)
    assert found == pytest.approx(0.05 * ((output - 2) + longer), rel=0.01)


def test_documents_may_bring_more_questions_than_was_known() -> None:
    time_left = TimeLeft(50)
    time_left.passed(15.0)
    time_left.add([row("a", 1000, 100, 10.0, 5.0)], 4000)
    assert time_left.seconds(1, 4000, [], 1) == pytest.approx(10 + 5)


def test_nothing_is_said_before_something_is_known() -> None:
    time_left = TimeLeft(256)
    time_left.passed(60.0)
    read = SoFar(1000, 2, 9.0, 0.1, 4000)
    assert time_left.seconds(3, 12_000, [], 1) is None
    assert time_left.seconds(3, 12_000, [SoFar(900, 0, 0.0, 0.0, 4000)], 1) is None
    assert time_left.seconds(3, 12_000, [SoFar(1000, 1, 9.0, 0.0, 4000)], 1) is None, "what a step takes"
    assert time_left.seconds(3, 12_000, [read], 1) is not None
    assert time_left.seconds(3, 12_000, [read], 0) is None, "no worker is there"
    assert time_left.seconds(0, 0, [read], 1) is None, "all are done"
    failed = TimeLeft(256)
    failed.add([make_row("d", "d.txt", "error")], 4000)
    failed.add([make_row("d", "d.txt", "too_long", prompt_tokens=1 << 20)], 4000)
    assert failed.seconds(2, 8000, [], 1) is None


def test_a_lost_worker_changes_no_price() -> None:
    """What it had in work is gone, and so are the tokens that were told. A step took 10 ms and 10 µs for each token."""
    time_left = TimeLeft(256)
    first = SoFar(1000, 100, 10.0, 100 * (0.01 + 1e-5 * 500), 4000)  # half of its prompt together, since the last look
    second = SoFar(9000, 100, 90.0, 100 * (0.01 + 1e-5 * 5500), 36_000)
    time_left.seconds(3, 52_000, [first], 1)
    time_left.seconds(3, 52_000, [first, second], 1)
    time_left.seconds(3, 52_000, [], 1)
    third = SoFar(3000, 50, 30.0, 50 * (0.01 + 1e-5 * 1500), 12_000)
    time_left.seconds(3, 52_000, [third], 1)
    assert _line(time_left._steps) == pytest.approx((0.01, 1e-5))


def test_a_listing_may_give_no_sizes() -> None:
    time_left = TimeLeft(256)
    assert time_left.seconds(1, 0, [SoFar(1000, 51, 10.0, 5.1, 0)], 1) is not None
    time_left.add([row("a", 1000, 100, 10.0, 5.0)], 0)
    assert time_left.seconds(1, 0, [], 1) is not None
