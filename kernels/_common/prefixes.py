"""Keys that stand before a row's own in decode attention, and which rows share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._common.rows import check_rows


@dataclass(frozen=True)
class Prefixes:
    """Of S rows of a decode batch: where the keys lie that come before the row's own, and whose are the same.

    starts: int64 [S]; lengths: int32 [S]: row s sees arena rows [starts[s], starts[s] + lengths[s]), then its own ones.
        0 for a row without. In an fp8 arena starts are multiples of 16.
    members: int32 [groups, R]: the rows of each group, whose prefixes begin at one place; their keys are read once for
        all of them. Places without a row hold a number outside [0, S), behind a group's rows -1; groups without rows
        are all -1 and come last. Lengths may differ within a group. Every row with a prefix is in one group; the
        reference does not look here.
    max_length: a bound on `lengths` known on the host, as for the rows' own keys. The tensors are not read there, so
        that a CUDA graph can be captured.
    """

    starts: Tensor
    lengths: Tensor
    members: Tensor
    max_length: int

    @staticmethod
    def of_all(rows: int, start: int, tokens: int, max_length: int, device: torch.device) -> Prefixes:
        """So many rows that share one prefix, which begins at `start`: its keys are read once for all of them."""
        # Padded, so that kernels are not compiled for every number of rows.
        members = torch.full((1, 1 << (rows - 1).bit_length()), -1, dtype=torch.int32, device=device)
        members[0, :rows] = torch.arange(rows, dtype=torch.int32, device=device)
        return Prefixes(
            torch.full((rows,), start, dtype=torch.int64, device=device),
            torch.full((rows,), tokens, dtype=torch.int32, device=device),
            members,
            max_length,
        )

    def check(self, rows: int) -> None:
        """Raise ValueError unless the shapes and types are those of a batch of so many rows."""
        check_rows("prefixes.starts", self.starts, torch.int64, rows)
        check_rows("prefixes.lengths", self.lengths, torch.int32, rows)
        if self.max_length < 1:
            raise ValueError(f"prefixes.max_length must be at least 1, got {self.max_length}")
        if self.members.ndim != 2 or self.members.dtype != torch.int32 or self.members.stride(1) != 1:
            raise ValueError(
                "prefixes.members must be int32 [groups, rows of a group] with a contiguous last dimension, got "
                f"{self.members.dtype} {tuple(self.members.shape)}"
            )
