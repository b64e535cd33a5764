"""Row budgets: golden values of the published schedules, and the solved density."""

import hashlib

import numpy as np
import pytest

from stem_core import StemConfig, prompt_budget, row_budgets
from stem_core.budget import causal_density

# n blocks of 128 tokens: (kept blocks in total, budget of the middle row, of the last row).
GOLDEN = {
    "paper": {
        8: (36, 5, 8),
        55: (1428, 28, 39),
        56: (1469, 29, 39),
        128: (4650, 46, 38),
        159: (6060, 46, 38),
        160: (6107, 46, 38),
        256: (10515, 46, 38),
        1024: (85026, 88, 73),
    },
    "release": {
        8: (36, 5, 8),
        55: (1540, 28, 55),
        56: (1377, 29, 28),
        128: (4917, 52, 38),
        159: (6924, 57, 42),
        160: (5482, 41, 32),
        256: (10835, 48, 38),
        1024: (108422, 115, 92),
    },
}
# SHA-256 of all budgets as int32, first 16 hex digits.
DIGESTS = {
    "paper 8": "8b4b2444e57aed8c",
    "paper 55": "484f919a02e549c4",
    "paper 56": "96b733ee7df9b63b",
    "paper 128": "5c252b28e717687a",
    "paper 159": "8a37e85eb620941a",
    "paper 160": "9946d568eef4370b",
    "paper 256": "0cfc45ce7d7a237a",
    "paper 1024": "a5ce5928e7d00673",
    "release 8": "8b4b2444e57aed8c",
    "release 55": "4c076f9a1ec06088",
    "release 56": "9f569115977b1db0",
    "release 128": "0a6f75d71b173dae",
    "release 159": "8236410028e17d5d",
    "release 160": "a0ab84a1af8fd6b2",
    "release 256": "4e13d97ca66fe5fd",
    "release 1024": "bedfc7f3cbab6903",
}


@pytest.mark.parametrize(("preset", "n"), [(preset, n) for preset, rows in GOLDEN.items() for n in rows])
def test_published_schedules_are_pinned(preset, n):
    budgets = row_budgets(n, StemConfig.preset(preset))
    assert (int(budgets.sum()), int(budgets[n // 2]), int(budgets[-1])) == GOLDEN[preset][n]
    assert budgets.dtype == np.int32
    assert hashlib.sha256(budgets.tobytes()).hexdigest()[:16] == DIGESTS[f"{preset} {n}"]


def test_release_schedule_by_hand():
    # n = 160: k0 = floor(0.1 * 160) + 30 = 46, flat up to row 46, then a straight line to floor(0.7 * 46) = 32.
    budgets = row_budgets(160, StemConfig.preset("release"))
    assert budgets[:46].tolist() == list(range(1, 47))
    assert budgets[46] == 46
    assert budgets[103] == int(46 - 0.3 * 46 * (103 - 46) / (159 - 46))
    assert budgets[159] == 32


def test_paper_schedule_by_hand():
    # 131,072 tokens: k_start = ceil(0.1 * 1024) = 103; row i keeps ceil(103 * (1 - 0.3 * i / 1024)).
    budgets = row_budgets(1024, StemConfig.preset("paper"))
    assert budgets[200] == int(np.ceil(103 * (1 - 0.3 * 200 / 1024)))
    assert budgets[1023] == int(np.ceil(103 * (1 - 0.3 * 1023 / 1024)))


def test_growing_schedule_by_hand():
    # 48 blocks and 6% of those before; the last row is the dense tail.
    budgets = row_budgets(256, StemConfig.preset("sampled"))
    assert budgets[:48].tolist() == list(range(1, 49))
    assert [int(budgets[i]) for i in (50, 51, 100, 254, 255)] == [51, 51, 54, 63, 256]


def test_growing_schedule_keeps_all_where_scores_cost_more_than_they_save():
    # Scores cost 1 / 16. Of 67 blocks rows 51 to 66 leave out 6% without the tail, of 68 there are 6.6%.
    sampled = StemConfig.preset("sampled")
    assert row_budgets(67, sampled).tolist() == list(range(1, 68))
    assert row_budgets(68, sampled).tolist() == [*range(1, 52), *[51] * 16, 68]
    cheap = sampled.replace(sample_rows=4)
    assert prompt_budget(60 * 128, cheap).density < 1 == prompt_budget(60 * 128, sampled).density


@pytest.mark.parametrize(
    ("tokens", "decay", "low", "high"),
    [(131_072, 0.7, 0.20, 0.22), (131_072, 1.0, 0.24, 0.255), (32_768, 0.7, 0.32, 0.38), (16_384, 0.7, 0.59, 0.66)],
)
def test_real_density_of_the_release_schedule(tokens, decay, low, high):
    assert low <= prompt_budget(tokens, StemConfig.preset("release", decay=decay)).density <= high


@pytest.mark.parametrize("n", [64, 200, 1024])
@pytest.mark.parametrize("decay", [0.7, 1.0])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_wanted_density_is_met(n, decay, density):
    config = StemConfig(schedule="density", density=density, decay=decay, dense_tail=2)
    budgets = row_budgets(n, config)
    assert causal_density(budgets) <= density
    assert causal_density(budgets) == pytest.approx(density, abs=2.5 / n)


def test_decay_gives_early_rows_more():
    budgets = row_budgets(512, StemConfig(schedule="density", density=0.25, decay=0.7))
    assert budgets[150] > budgets[-1]
    assert budgets[-1] / budgets.max() == pytest.approx(0.7, abs=0.05)


def test_always_kept_blocks_are_the_floor():
    budgets = row_budgets(300, StemConfig(schedule="density", density=0.001))
    assert budgets.tolist() == np.minimum(np.arange(1, 301), 8).tolist()


def test_dense_tail_rows_keep_everything():
    config = StemConfig(schedule="density", density=0.2, dense_tail=3)
    budgets = row_budgets(100, config)
    assert budgets[-3:].tolist() == [98, 99, 100]
    assert budgets[-4] < 97


def test_dense_prompts_say_why():
    assert "all 55 blocks" in prompt_budget(55 * 128, StemConfig.preset("release")).reason
    assert prompt_budget(56 * 128, StemConfig.preset("release")).budgets is not None
    assert "dense_below=9000" in prompt_budget(8999, StemConfig.preset("release", dense_below=9000)).reason
    assert prompt_budget(9000, StemConfig.preset("release", dense_below=9000)).budgets is not None


def test_small_blocks_make_short_prompts_sparse():
    # With 128-token blocks the released schedule keeps most of a 16K prompt: a small model tested so proves nothing.
    assert prompt_budget(16_384, StemConfig.preset("release", block_size=32)).density < 0.27
    assert prompt_budget(16_384, StemConfig.preset("release")).density > 0.59
