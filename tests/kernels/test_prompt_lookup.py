"""Draft tokens from the document itself: the reference against a search word by word, kernels compiled, arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.prompt_lookup import find_drafts
from tests.kernels import lookup_cases as cases
from tests.kernels import offline


def drafts_of(text: list[int], **options: int) -> list[int]:
    start, length = torch.zeros(1, dtype=torch.int64), torch.tensor([len(text)])
    ids = torch.tensor(text, dtype=torch.int32)
    options = {"drafts": 3, "max_length": len(text), **options}
    tokens, counts = find_drafts(ids, start, length, **options)
    return tokens[0, : counts[0]].tolist()


def test_the_longest_run_counts_and_then_the_latest_place() -> None:
    assert drafts_of([1, 2, 3, 7, 7, 7, 0, 2, 3, 8, 8, 8, 1, 2, 3]) == [7, 7, 7]  # 1 2 3 before 2 3
    assert drafts_of([1, 2, 3, 7, 7, 7, 1, 2, 3, 8, 8, 8, 1, 2, 3]) == [8, 8, 8]
    assert drafts_of([9, 2, 3, 7, 7, 7, 1, 2, 3, 8, 8, 8, 5, 5, 3], shortest=2) == []  # one token alone is too short
    assert drafts_of([9, 2, 3, 7, 7, 7, 1, 2, 3, 8, 8, 8, 5, 5, 3]) == [8, 8, 8]


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    assert drafts_of([0, 4, 4, 4]) == [4, 4, 4]
    assert drafts_of([0, 5, 6, 5, 6, 5]) == [6, 5, 6]
    assert drafts_of([1, 2, 3, 1, 2], drafts=7) == [3, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_reference_matches_a_search_word_by_word(case: cases.Lookup) -> None:
    cases.check(case, "reference", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_kernel_matches_a_search_word_by_word(case: cases.Lookup, poisoned: None) -> None:
    cases.check(case, "triton", "cuda")


def launch(rows: int, prefixes: bool, max_length: int = 131_072) -> None:
    ids, table = torch.empty(500_000, dtype=torch.int32), torch.empty(4, 64, dtype=torch.int64)
    starts, lengths, *before = (line[:rows] for line in table)
    names = dict(zip(("prefix_starts", "prefix_lengths"), before, strict=True)) if prefixes else {}
    find_drafts(ids, starts, lengths, drafts=3, max_length=max_length, impl="triton", **names)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm80", "sm90"])
def test_the_kernels_compile_without_spills(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # The launch checks ask for a GPU; compiling needs none.
    monkeypatch.setattr("kernels.dispatch.triton_unavailable", lambda device: "")
    reports = offline.compile_reports(lambda: [launch(8, prefixes) for prefixes in (False, True)], capability)
    assert len(reports) == 4
    assert [report.spills for report in reports] == [0] * 4


def test_they_are_not_compiled_anew_for_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.dispatch.triton_unavailable", lambda device: "")
    with offline.compiling((9, 0)) as compiled:
        for rows, longest in ((1, 4096), (2, 131_072), (16, 1000), (64, 524_288)):
            launch(rows, False, longest)
    assert len({kernel.hash for kernel in compiled}) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ids, n: find_drafts(ids.long(), n, n, drafts=3, max_length=9), r"contiguous int32 \[T\]"),
        (lambda ids, n: find_drafts(ids[::2], n, n, drafts=3, max_length=9), r"contiguous int32 \[T\]"),
        (lambda ids, n: find_drafts(ids, n, n[:1], drafts=3, max_length=9), "lengths must be contiguous int64"),
        (lambda ids, n: find_drafts(ids, n.int(), n, drafts=3, max_length=9), "starts must be contiguous int64"),
        (lambda ids, n: find_drafts(ids, n[:1].expand(2), n, drafts=3, max_length=9), r"starts .* strides \(0,\)"),
        (lambda ids, n: find_drafts(ids, n, n, drafts=3, max_length=9, prefix_starts=n), "together or not at all"),
        (lambda ids, n: find_drafts(ids, n, n, drafts=0, max_length=9), "at least 1"),
        (lambda ids, n: find_drafts(ids, n, n, drafts=1, max_length=9, shortest=7), "shortest <= longest"),
        (lambda ids, n: find_drafts(ids, n, n, drafts=1, max_length=9, impl="gluon"), "no gluon implementation"),
        (lambda ids, n: find_drafts(ids, n, n, drafts=1, max_length=9, impl="triton"), "need a CUDA device"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[Tensor, Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(40, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))
