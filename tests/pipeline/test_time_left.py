"""The time left of a job: by a job that was recorded, and where few documents are done, or few are left."""

from __future__ import annotations

import pytest
from result_rows import make_row

from pipeline.job.time_left import TimeLeft
from pipeline.results.rows import Row

# Of 24 documents that SmolLM2-135M summarised on one core, 4 together, outputs cut at 250 tokens: seconds at which each
# was done, its bytes, tokens of prompt and output, seconds of prefill and decoding.
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
READINGS = {
    30.5: (6, [(2196, 69), (1073, 69), (1323, 69), (1294, 69), (0, 0), (0, 0)]),
    72.9: (6, [(971, 182), (706, 61), (745, 16), (606, 16), (0, 0), (0, 0)]),
    101.4: (6, [(542, 176), (760, 55), (558, 10), (512, 0), (0, 0), (0, 0)]),
    144.1: (5, [(414, 101), (469, 57), (289, 40), (320, 0), (0, 0)]),
}


def row(read: int = 1000, written: int = 100, prefill: float = 0.0, decode: float = 0.0, shared: int = 0) -> Row:
    return make_row(
        "d", "d.txt", prompt_tokens=read, prefix_tokens=shared, output_tokens=written, prefill_seconds=prefill,
        decode_seconds=decode,
    )  # fmt: skip


@pytest.mark.parametrize("at", READINGS)
def test_a_recorded_job_whose_outputs_are_long(at: float) -> None:
    """Too short by 15, 17 and 36 percent, since later outputs were longer; a pace of bytes had 47, 42 and 27 percent of
    what was left.
    """
    time_left = TimeLeft()
    done = [each for each in RECORDED if each[0] <= at]
    for _, size, *measured in done:
        time_left.add([row(*measured)], size)  # type: ignore[arg-type]
    time_left.passed(at)
    held, reading = READINGS[at]
    size = JOB_BYTES - sum(each[1] for each in done)
    found = time_left.seconds(JOB_DOCUMENTS - len(done), size, held, reading, 1)
    if len(done) < held:
        assert found is None
    else:
        assert found == pytest.approx(JOB_SECONDS - at, rel=0.4)


def test_written_tokens_are_priced_apart() -> None:
    """In 110 s a worker has read two documents, one of them twice as long, for 30 s, and written 160 tokens."""
    time_left = TimeLeft()
    time_left.add([row(1000, 50, prefill=10.0)], 4000)
    time_left.add([row(2000, 110, prefill=20.0)], 8000)
    time_left.passed(110.0)
    assert time_left.seconds(1, 400_000, 0, [], 1) == pytest.approx(1000 + 40), "long, its output like others"
    assert time_left.seconds(100, 4000, 0, [], 1) == pytest.approx(10 + 4000), "short, each with an output"
    assert time_left.seconds(100, 4000, 0, [], 4) == pytest.approx((10 + 4000) / 4)
    assert time_left.seconds(1, 400_000, 0, [], 4) == pytest.approx(1000 + 40), "one worker alone has it"


def test_what_is_done_of_documents_in_work_is_not_left() -> None:
    time_left = TimeLeft()
    time_left.add([row(1000, 100, prefill=10.0)], 4000)
    time_left.passed(10.0 + 5.0 + 15.0)  # 5 of which another was read in, and 15 written: 150 tokens of both
    assert time_left.seconds(1, 4000, 1, [(500, 50)], 1) == pytest.approx(5 + 5)
    assert time_left.seconds(1, 4000, 1, [(9000, 300)], 1) == 0, "longer than others: nothing is known of the rest"


def test_a_few_documents_take_as_long_as_their_own_steps() -> None:
    """Eight that were decoded together wrote a token in an eighth of a step."""
    time_left = TimeLeft()
    for _ in range(8):
        time_left.add([row(1000, 100, prefill=1.0, decode=8.0)], 4000)
    time_left.passed(8 + 8.0)
    assert time_left.seconds(8, 32_000, 8, [(1000, 0)] * 8, 1) == pytest.approx(8)
    assert time_left.seconds(1, 4000, 1, [(1000, 0)], 1) == pytest.approx(8)
    assert time_left.seconds(1, 4000, 1, [(1000, 75)], 1) == pytest.approx(2)
    assert time_left.seconds(2, 4000, 1, [(1000, 75)], 1) == pytest.approx(8), "one has not begun"


def test_several_questions_to_a_document_are_answered_side_by_side() -> None:
    time_left = TimeLeft()
    time_left.add([row(1000, 100, prefill=10.0, decode=8.0), row(1000, 100, decode=9.0, shared=900)], 4000)
    time_left.passed(19.0)
    assert time_left.seconds(1, 4000, 0, [], 1) == pytest.approx(10 + 9)


def test_nothing_is_said_before_something_is_known() -> None:
    time_left = TimeLeft()
    time_left.passed(60.0)
    assert time_left.seconds(3, 12_000, 0, [], 1) is None
    time_left.add([row()], 4000)
    assert time_left.seconds(2, 8000, 2, [], 1) is None, "who ends first has a short output"
    assert time_left.seconds(2, 8000, 1, [], 1) is not None
    assert time_left.seconds(2, 8000, 0, [], 0) is None, "no worker is there"
    failed = TimeLeft()
    failed.passed(60.0)
    failed.add([make_row("d", "d.txt", "error")], 4000)
    failed.add([make_row("d", "d.txt", "too_long", prompt_tokens=1 << 20)], 4000)
    assert failed.seconds(2, 8000, 0, [], 1) is None
