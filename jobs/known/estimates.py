"""Means with 95% intervals, which have a width also where every observation is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, None where there is one document only; n observations in `documents` documents."""

    mean: float
    low: float | None
    high: float | None
    n: int
    documents: int


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share, `hits` of n; it reaches 0 or 1 only where none or all are hits."""
    p = hits / n
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return (middle - half if p > 0 else 0.0), (middle + half if p < 1 else 1.0)


def estimate(values: Sequence[float], documents: Sequence[str]) -> Estimate:
    """Mean of shares in [0, 1], with a bootstrap over documents: questions of one document are not independent.

    Where no drawing shows a spread (all right, none right, one document) the interval is Wilson's, over the questions.
    """
    low, high = _bootstrap(values, documents)
    if low == high:
        low, high = wilson(sum(values), len(values))
    return Estimate(sum(values) / len(values), low, high, len(values), len(set(documents)))


def paired(values: Sequence[float], others: Sequence[float], documents: Sequence[str]) -> Estimate:
    """Mean difference of shares in [0, 1] on the same questions, with a bootstrap over documents.

    Where no drawing shows a spread it is Tango's score interval (1998) for pairs of which none is discordant,
    -+ z^2 / (n + z^2), about the mean: so large a difference may be hidden from n questions.
    """
    gaps = [value - other for value, other in zip(values, others, strict=True)]
    middle = sum(gaps) / len(gaps)
    low, high = _bootstrap(gaps, documents)
    if low == high:
        hidden = Z95**2 / (len(gaps) + Z95**2)
        low, high = max(-1.0, middle - hidden), min(1.0, middle + hidden)
    return Estimate(middle, low, high, len(gaps), len(set(documents)))


def mean(values: Sequence[float], documents: Sequence[str]) -> Estimate:
    """Mean of values of any size (KL, loss), with a bootstrap over documents."""
    low, high = _bootstrap(values, documents)
    one = len(set(documents)) == 1
    middle = sum(values) / len(values)
    return Estimate(middle, None if one else low, None if one else high, len(values), len(set(documents)))


def _bootstrap(values: Sequence[float], documents: Sequence[str]) -> tuple[float, float]:
    """2.5% and 97.5% quantiles of the mean over documents drawn with replacement."""
    names = sorted(set(documents))
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    for value, name in zip(values, documents, strict=True):
        sums[name] += value
        counts[name] += 1
    totals, weights = np.array(list(sums.values())), np.array(list(counts.values()))
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = np.quantile(totals[drawn].sum(1) / weights[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)
