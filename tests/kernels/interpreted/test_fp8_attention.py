"""The portable Triton kernels of fp8 attention, interpreted: logic, masks, strides and offsets on small shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8
from tests.kernels import fp8_cases as cases
from tests.kernels.attention_cases import Case
from tests.kernels.selection_cases import Decode, Scores
from tools.benchmark._attention_cases import random_selection
from tools.benchmark._attention_fp8 import Fp8Layer
from tools.benchmark._row_errors import even_operands, problem_of, row_errors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Outputs in bfloat16 are tested on a GPU.
ATTENTION = [
    Case(1, block_size=32, head_dim=64, dtype=FP32),
    Case(127, block_size=32, head_dim=64, heads=2, kv_heads=1, unknown=40, dtype=FP32),
    Case(129, block_size=64, head_dim=64, heads=2, batch=2, unknown=70, dtype=FP16),
    Case(50, start=96, block_size=32, head_dim=96, unknown=33, dtype=FP32),
    Case(200, start=256, heads=4, kv_heads=1, dtype=FP32),
    Case(257, block_size=256, head_dim=64, heads=2, kv_heads=1, dtype=FP32),
    Case(190, head_dim=64, keep=None, heads=2, batch=2, unknown=5, dtype=FP32),
    Case(99, start=37, head_dim=96, keep=None, heads=2, dtype=FP32),
    Case(70, start=130, head_dim=64, keep=None, heads=2, window=50, dtype=FP32),
    Case(100, block_size=32, head_dim=64, heads=2, window=40, dtype=FP32),
    Case(96, block_size=32, head_dim=64, heads=3, kv_heads=3, keep=1.0, scale=0.3, dtype=FP32),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_block_sparse_attention(case: Case, poisoned: None, rounding_to_nearest: None) -> None:
    cases.check_attention(case, "triton", "cpu")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("density", [None, 0.5], ids=["dense", "50%"])
def test_rows_that_see_a_thousand_keys(density: float | None, impl: str, rounding_to_nearest: None) -> None:
    """Sums on two levels, past several of their turns: no block is lost or counted twice."""
    layer = Fp8Layer(*even_operands(2, 1, 1285, 64, "cpu"))
    q8, (k8, vt8) = layer.q8, layer.arenas
    selection = None if density is None else random_selection(layer.q, density)
    found = block_sparse_attention_fp8(
        q8, k8[None], vt8[None], layer.scales, selection, dtype=FP32, return_lse=True, impl=impl
    )
    assert isinstance(found, tuple)
    errors = row_errors(found[0], layer.exact, selection, lse=found[1])
    assert [error.row for error in errors] == ([1023, 1284] if density is None else [1023])
    assert problem_of(errors) == ""


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("length", "dtype", "head_dim"), [(1, FP32, 64), (70, BF16, 96), (128, FP16, 128), (143, BF16, 64)]
)
def test_writing(
    length: int, dtype: torch.dtype, head_dim: int, impl: str, poisoned: None, rounding_to_nearest: None
) -> None:
    cases.check_writing(length, dtype, head_dim, impl, "cpu")
    cases.check_key_bias(length, dtype, head_dim, impl, "cpu")


def test_writing_runs(rounding_to_nearest: None) -> None:
    cases.check_runs("triton", "cpu")


def test_programs_of_a_run_write_different_places(rounding_to_nearest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they come one after the other, on a GPU at once: the last one first must give the same."""
    from kernels.fp8_heads import triton

    class Backwards:
        """Launches the programs of each token alone, the last token's first."""

        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(k: Any, v: Any, *others: Any, **options: Any) -> None:
                arenas, scales, slots, tokens = others[:2], others[2:5], others[5], others[6]
                for s in reversed(range(grid[1])):
                    # The program's number is 0: what stands before it is cut off.
                    rest = slots[s:].clone(), tokens - s
                    kernel[grid[0], 1](k[s:], v[s:], *arenas, *scales, *rest, *others[7:], **options)

            return launch

    kernel = triton.append_kernel
    monkeypatch.setattr(triton, "append_kernel", Backwards())
    cases.check_runs("triton", "cpu")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        Decode((0, 1, 129, 700), dtype=FP16),
        Decode((127, 128, 1000), head_dim=96, dtype=FP32, window=130),
        Decode((33, 17), heads=3, kv_heads=3, head_dim=256, window=5),
        Decode((0, 1, 129, 700), head_dim=64, dtype=FP16, sinks=True),
        Decode((700, 3), dtype=FP32, window=128, sinks=True),
    ],
    ids=str,
)
def test_decode(case: Decode, impl: str, poisoned: None, rounding_to_nearest: None) -> None:
    cases.check_decode(case, impl, "cpu")


@pytest.mark.parametrize(
    "case",
    [
        Scores(127, head_dim=96, every=32),
        Scores(129, batch=2, block_size=16, every=1),
        Scores(300, head_dim=128, block_size=128, every=8, dtype=FP16),
    ],
    ids=str,
)
def test_sample_scores(case: Scores, poisoned: None, rounding_to_nearest: None) -> None:
    cases.check_sample(case, "triton", "cpu")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_oam_scores_by_chunks_of_keys(impl: str, poisoned: None) -> None:
    cases.check_oam_by_chunks_of_keys(impl, "cpu")
