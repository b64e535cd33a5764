"""Choosing the next token on the device, without a host synchronisation and without a shared random state."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers: torch has no arithmetic on unsigned ones.
_GAMMA = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def document_seed(seed: int, request_id: str) -> int:
    """A signed 64-bit seed for one document: the same in every run, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}\0{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch's >> copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """float64 in [0, 1) for int64 `seeds` and `steps` of one shape: draw number `steps` of each seed's stream."""
    z = seeds + (steps + 1) * _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def greedy(logits: Tensor) -> Tensor:
    """logits [S, V] -> int64 [S]."""
    return logits.argmax(dim=-1)


def penalise(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """float32 logits [S, V] in which those of tokens that a row has seen are smaller, as transformers' repetition
    penalty makes them.

    seen: int32 [S, W] with 32 W >= V, by token a bit (token i is bit i % 32 of word i // 32). penalties: float32 [S],
    what logits above 0 are divided by and others multiplied with; 1 changes nothing.
    """
    rows, factors = logits.float(), penalties[:, None]
    bits = (seen[..., None] >> torch.arange(32, dtype=torch.int32, device=seen.device)) & 1
    there = bits.flatten(1)[:, : logits.shape[-1]] > 0
    return torch.where(there, torch.where(rows > 0, rows / factors, rows * factors), rows)


def sample(
    logits: Tensor, temperatures: Tensor, top_ps: Tensor, top_ks: Tensor, min_ps: Tensor, draws: Tensor
) -> Tensor:
    """Top-k, top-p, then min-p sampling by inverse CDF over the tokens from the most likely down, as transformers does.

    logits [S, V]; temperatures, top_ps float32 [S]; top_ks int64 [S], 0 keeps all; min_ps float32 [S], the least share
    of the most likely token's probability that a token needs; draws float64 [S] in [0, 1). A temperature of 0 takes the
    argmax. Returns int64 [S]. A row's result depends on that row alone. Ties go to the lower token id.
    """
    rows = logits.float()
    scaled = rows / temperatures.clamp(min=1e-6)[:, None]
    probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    total = probabilities.double().cumsum(dim=-1)
    before = total - probabilities
    some = top_ks > 0
    last = (top_ks.clamp(1, logits.shape[-1]) - 1)[:, None]
    held = torch.where(some[:, None], total.gather(1, last), 1.0)
    # A token is kept while the more likely ones together fall short of top_p of what the top k hold; the first one
    # always is.
    kept = before < top_ps.double()[:, None] * held
    kept &= (torch.arange(logits.shape[-1], device=logits.device) <= last) | ~some[:, None]
    kept &= probabilities >= min_ps[:, None] * probabilities[:, :1]
    kept &= probabilities > 0  # a draw that rounding puts past the last one must not take a token that is masked
    kept[:, 0] = True
    mass = probabilities.masked_fill(~kept, 0.0).sum(dim=-1, dtype=torch.float64)
    below = (total <= (draws * mass)[:, None]) & kept
    # Rounding can put a draw past the last kept token.
    place = torch.minimum(below.sum(dim=-1), kept.sum(dim=-1) - 1)
    sampled = order.gather(1, place[:, None])[:, 0]
    return torch.where(temperatures > 0, sampled, greedy(rows))
