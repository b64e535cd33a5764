"""Masked tokens: the reference against single bits, the kernel compiled for Ampere and Hopper, arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.token_mask import mask_tokens
from tests.kernels import offline
from tests.kernels import token_mask_cases as cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_reference_matches_the_bits(dtype: torch.dtype) -> None:
    cases.check(dtype, "reference", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_kernel_matches_the_bits(dtype: torch.dtype) -> None:
    cases.check(dtype, "triton", "cuda")


def launch(rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    table = torch.empty(rows, 4749, dtype=torch.int32)
    mask_tokens(torch.empty(rows, 151_936, dtype=dtype), table[:, :4748], table[:, 4748], impl="triton")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm80", "sm90"])
def test_the_kernel_compiles_without_spills(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # The launch checks ask for a GPU; compiling needs none.
    monkeypatch.setattr("kernels.dispatch.triton_unavailable", lambda device: "")
    reports = offline.compile_reports(lambda: [launch(8, dtype) for dtype in cases.DTYPES], capability)
    assert len(reports) == len(cases.DTYPES)
    assert [report.spills for report in reports] == [0] * len(reports)


def test_it_is_not_compiled_anew_for_another_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.dispatch.triton_unavailable", lambda device: "")
    with offline.compiling((9, 0)) as compiled:
        for rows in (1, 2, 8, 64):
            launch(rows)
    assert len({kernel.hash for kernel in compiled}) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m, f: mask_tokens(x.long(), m, f), "one type out of bfloat16"),
        (lambda x, m, f: mask_tokens(x[0], m, f), r"logits must be \[S, V\]"),
        (lambda x, m, f: mask_tokens(x, m[:, :1], f), r"int32 \[3, at least 2\]"),
        (lambda x, m, f: mask_tokens(x, m.long(), f), "masks must be int32"),
        (lambda x, m, f: mask_tokens(x, m[:2], f), r"int32 \[3, at least 2\]"),
        (lambda x, m, f: mask_tokens(x, m, f[:2]), r"masked must be int32 \[3\]"),
        (lambda x, m, f: mask_tokens(x, m, f.bool()), r"masked must be int32 \[3\]"),
        (lambda x, m, f: mask_tokens(x, m.T.contiguous().T, f), "words of a row must be contiguous"),
        (lambda x, m, f: mask_tokens(x, m, f, impl="gluon"), "no gluon implementation"),
        (lambda x, m, f: mask_tokens(x, m, f, impl="triton"), "need a CUDA device"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., None], message: str) -> None:
    arguments = torch.zeros(3, 40), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        call(*arguments)
