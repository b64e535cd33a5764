"""From rows to figures: means with intervals over the documents, and the length from which Stem is not slower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.audit.known import known_figures
from jobs.audit.measure import ArmRun, Point, point_of
from jobs.audit.results import AUDIT_COLUMNS, AuditRow
from jobs.known.estimates import Estimate, estimate, wilson
from jobs.known.estimates import mean as average

# Fewer documents than this have no interval of a mean: resampling them would show less spread than there is.
FEWEST = 5
# Two prefills that differ by less are equally fast.
TIMING_NOISE = 0.02
# Where the same work takes so many times as long at another time, no time means anything.
UNSTEADY = 1.25


def share(values: Sequence[float]) -> Estimate:
    """The mean over documents of shares in [0, 1], with an interval where there are enough; Wilson's of yes and no."""
    if set(values) <= {0, 1}:
        return Estimate(sum(values) / len(values), *wilson(sum(values), len(values)), len(values), len(values))
    return _unless_few(estimate(values, _names(values)))


def mean(values: Sequence[float]) -> Estimate:
    """The mean over documents of any values, with a bootstrap interval where there are enough."""
    return _unless_few(average(values, _names(values)))


def _names(values: Sequence[float]) -> list[str]:
    return [str(index) for index in range(len(values))]


def _unless_few(found: Estimate) -> Estimate:
    return found if found.documents >= FEWEST else replace(found, low=None, high=None)


def unseen(documents: int, total: int) -> float:
    """The largest share of `total` that can be spoilt while `documents` of them, drawn at random, show none (95%)."""
    return min(1 - 0.05 ** (1 / documents), 1 - documents / total)


@dataclass(frozen=True)
class Crossover:
    """From how many tokens on a sparse arm is not slower than dense in the same precision.

    tokens: the shortest measured prompt from which no longer one was slower; None if the longest was. slower: the
    longest measured prompt that was slower; None if none was. shortest: the shortest one that ran sparse; None if none.
    """

    tokens: int | None
    slower: int | None
    shortest: int | None


def crossover(sparse: Sequence[Point], dense: Sequence[Point]) -> Crossover:
    """Over the prompts that both ran, sparse in one."""
    by_length: dict[int, list[float]] = {}
    reference = _fastest(dense)
    for point in sparse:
        if point.sparse and point.prompt_tokens in reference:
            by_length.setdefault(point.prompt_tokens, []).append(point.seconds / reference[point.prompt_tokens])
    lengths = sorted(by_length)
    slower = [length for length in lengths if min(by_length[length]) > 1 + TIMING_NOISE]
    after = [length for length in lengths if not slower or length > slower[-1]]
    return Crossover(after[0] if after else None, slower[-1] if slower else None, lengths[0] if lengths else None)


def _fastest(points: Sequence[Point]) -> dict[int, float]:
    found: dict[int, float] = {}
    for point in points:
        found[point.prompt_tokens] = min(point.seconds, found.get(point.prompt_tokens, math.inf))
    return found


def curve(run: ArmRun) -> list[Point]:
    """All prefills of an arm that were timed, the documents' among them, shortest first."""
    documents = [point_of(done.prompt_tokens, done) for done in run.completions.values() if done.status == "ok"]
    return sorted([*run.curve, *documents], key=lambda point: point.prompt_tokens)


def arm_figures(run: ArmRun, rows: Sequence[AuditRow], dense: ArmRun | None, reference: ArmRun) -> dict[str, Any]:
    """One record for the file of figures. rows: the arm's. dense: the dense arm in the same precision, if it could run.

    Units and names are those of tools.benchmark engine. first_token_vs_dense, first_token_vs_reference: how many times
    faster the prompts of the documents that both finished were prefilled.
    """
    ok = [row for row in rows if row.outcome.status == "ok"]
    points, steps = curve(run), [row.decode_step_ms for row in ok]
    found: dict[str, Any] = {
        "arm": run.arm.name,
        "preset": run.arm.preset,
        "budget": run.arm.budget,
        "precision": run.arm.precision,
        "documents": len(rows),
        "failed": len(rows) - len(ok),
        "sparse_documents": sum(row.from_engine.attention == "stem" for row in ok),
        "first_token_seconds": _average([row.first_token_seconds for row in ok]),
        "first_token_vs_dense": _times(dense, run),
        "first_token_vs_reference": _times(reference, run),
        "mean_decode_step_ms": _average(steps),
        "decode_step_alone": None if run.step is None else {"prompt_tokens": run.step[0], "step_ms": run.step[1]},
        "seconds": run.seconds,
        "documents_per_hour": run.documents_per_hour,
        "output_tokens_per_second": sum(row.from_engine.output_tokens for row in ok) / run.seconds,
        "prompt_tokens_per_second": sum(row.from_engine.prompt_tokens for row in ok) / run.seconds,
        "density": _average([row.from_engine.density for row in ok]),
        "peak_bytes": max((row.from_engine.peak_gpu_bytes for row in ok), default=0),
        "load_seconds": run.load_seconds,
        "repeat_seconds": run.repeated,
        "crossover": None if run.arm.dense or dense is None else asdict(crossover(points, curve(dense))),
        "curve": [asdict(point) for point in points],
        "known": known_figures(run.known, reference.known),
        "engine": run.about,
        "plan": run.plan,
    }
    return found | {name: None if value is None else asdict(value) for name, value in _likeness(ok).items()}


def unsteadiness(arms: Sequence[dict[str, Any]]) -> float:
    """The largest ratio between two times of the same work, over arm_figures() of all arms; 1 if they are equal."""
    pairs = [arm["repeat_seconds"] for arm in arms if arm["repeat_seconds"]]
    return max((max(pair) / min(pair) for pair in pairs), default=1.0)


def _likeness(rows: Sequence[AuditRow]) -> dict[str, Estimate | None]:
    columns = {each.name: each for each in AUDIT_COLUMNS}

    def over(name: str, how: Any) -> Estimate | None:
        values = [value for row in rows if (value := columns[name].of(row)) is not None]
        return how(values) if values else None

    shares, means = ("first_token_agrees", "exact_match", "token_agreement", "rouge_l"), ("first_token_kl", "answer_kl")
    return {name: over(name, share) for name in shares} | {name: over(name, mean) for name in means}


def _average(values: Sequence[float | None]) -> float | None:
    """Over those that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _times(slow: ArmRun | None, fast: ArmRun) -> float | None:
    if slow is None:
        return None
    both = [
        (slow.completions[name].prefill_seconds, done.prefill_seconds)
        for name, done in fast.completions.items()
        if done.status == slow.completions[name].status == "ok"
    ]
    return sum(a for a, _ in both) / sum(b for _, b in both) if both else None
