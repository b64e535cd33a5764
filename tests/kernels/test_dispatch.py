"""Which implementation is picked on a GPU that is not there, and why not a faster one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kernels import device, dispatch

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
CUDA = torch.device("cuda", 0)


def test_the_hopper_kernels_are_proven_on_the_pinned_triton() -> None:
    """Else `make` would give an H100 the slower path. A new version enters the list once the GPU tests passed on it."""
    pinned = re.search(r"^triton==(\d+)\.(\d+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned, "constraints.txt pins Triton"
    assert (int(pinned[1]), int(pinned[2])) in dispatch.HOPPER_TRITON_VERSIONS


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((9, 0), (3, 6, 0), ""),
        ((9, 0), (3, 7, 1), ""),
        ((8, 0), (3, 7, 1), "the Hopper path needs compute capability 9.x, got 8.0"),
        ((9, 0), (2, 9, 9), "the Hopper path was tested with Triton 3.6, 3.7, got 2.9.9"),
        ((9, 0), None, "the Hopper path was tested with Triton 3.6, 3.7, got none"),
    ],
)
def test_hopper_path(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: tuple[int, ...] | None, reason: str
) -> None:
    monkeypatch.setattr(device, "capability", lambda _: capability)
    monkeypatch.setattr(dispatch, "triton_version", lambda: version)
    assert dispatch.hopper_unavailable(CUDA) == reason


def test_a_slower_path_says_why() -> None:
    assert dispatch.Choice("gluon").slower("prefill") == ""
    assert dispatch.Choice("triton", "too old").slower("prefill") == "prefill runs on triton, not gluon: too old"
    assert dispatch.choose_portable("decode", torch.device("cpu")).slower("decode") == "", "expected on a CPU"
