"""What a selection keeps: attention mass of sampled rows, and the blocks of the needles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jobs.evaluate.documents import Span
from jobs.evaluate.scores import MASS_ENTRIES, Place, block_shares
from kernels.block_selection import BlockSelection

# Rows of a chunk whose attention is computed in full.
SAMPLED_ROWS = 32


@dataclass
class Probe:
    """Looks at one chunk in every layer.

    needles: token ranges whose blocks ought to be kept, with the query position that needs them. rows: of the chunk.
    mass: by layer, retained share of the attention of the sampled rows, mean over rows and heads.
    kept: by layer, for each needle, the share of heads that keep its blocks.
    """

    needles: Sequence[tuple[Span, int]] = ()
    rows: int = 1
    mass: dict[int, float] = field(default_factory=dict)
    kept: dict[int, list[float]] = field(default_factory=dict)

    def see(self, q: Tensor, k: Tensor, place: Place, selection: BlockSelection | None, block_size: int) -> None:
        """Measure one layer; shapes as for Arm.select. Synchronises with the device."""
        if selection is None:
            self.mass[place.layer], self.kept[place.layer] = 1.0, [1.0] * len(self.needles)
            return
        rows = torch.linspace(0, q.shape[2] - 1, min(SAMPLED_ROWS, q.shape[2])).round().long()
        mask = selection.to_mask(-(-(place.start + q.shape[2]) // block_size))
        shares = []
        for row in rows.split(max(1, MASS_ENTRIES // (q.shape[0] * q.shape[1] * (place.start + q.shape[2])))):
            share = block_shares(q[:, :, row], k, place.start + row, block_size, place.scale)
            kept = mask[:, :, row // block_size, : share.shape[-1]]
            shares.append((share * kept).sum(-1).mean((0, 1)))
        self.mass[place.layer] = float(torch.cat(shares).mean())
        found = []
        for (first, last), position in self.needles:
            row = (position - place.start) // block_size
            blocks = mask[0, :, row, first // block_size : (last - 1) // block_size + 1]
            found.append(float(blocks.all(-1).float().mean()))
        self.kept[place.layer] = found


def merge_probes(probes: Sequence[Probe], layers: int) -> Probe:
    """The chunks of a document as one probe. A chunk's mean mass counts by its rows: the last one may be short."""
    rows = [probe.rows for probe in probes]
    merged = Probe([needle for probe in probes for needle in probe.needles], rows=sum(rows))
    for layer in range(layers):
        merged.mass[layer] = float(np.average([probe.mass.get(layer, 1.0) for probe in probes], weights=rows))
        merged.kept[layer] = [kept for probe in probes for kept in probe.kept.get(layer, [1.0] * len(probe.needles))]
    return merged
