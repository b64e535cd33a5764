"""What to run, from the figures: the fastest arm whose outputs are like dense's, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.audit.figures import UNSTEADY, unseen, unsteadiness
from jobs.audit.options import Limits

# An arm that makes so many more documents an hour is faster, if the same work did not take longer by more than that.
FASTER = 1.03

Figures = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """verdict: "use" an arm other than the reference, "stay" with the reference, or "none": not to be told from this.

    flags: what to give jobs.summarize. reasons: (arm, the figures for and against it); caveats: what all this does not
    show.
    """

    verdict: str
    arm: str
    headline: str
    flags: str
    reasons: tuple[tuple[str, str], ...]
    caveats: tuple[str, ...]


def recommend(arms: Sequence[Figures], limits: Limits, total: int, *, random_weights: bool = False) -> Advice:
    """arms: records of figures.arm_figures(), the reference first. total: documents that the sample was drawn from."""
    reference, others = arms[0], arms[1:]
    spread = unsteadiness(arms)
    enough = max(FASTER, spread)
    steady = f"The same work, done twice, differed in time by up to {spread:.2f}x: smaller differences mean nothing."
    if random_weights:
        headline = "Random weights: the speeds are real, the outputs mean nothing, so nothing is recommended."
        reasons = tuple((arm["arm"], _speed(arm, reference)) for arm in others)
        return Advice("none", "", headline, "", reasons, (steady,))
    reasons = tuple((arm["arm"], _reason(arm, reference, limits, enough)) for arm in others)
    like = [arm for arm in others if not _obstacle(arm, limits)]
    faster = [arm for arm in like if _ratio(arm, reference) >= enough]
    best = max(faster, key=lambda arm: arm["documents_per_hour"], default=None)
    if best is not None:
        # Of arms that are equally fast, the one whose outputs are closest to dense's.
        best = max(
            (arm for arm in faster if arm["documents_per_hour"] * enough >= best["documents_per_hour"]),
            key=lambda arm: (arm["rouge_l"]["mean"], arm["token_agreement"]["mean"], arm["documents_per_hour"]),
        )
    caveats = (steady, *_caveats(arms, best or reference, limits, total))
    if spread > UNSTEADY:
        headline = (
            f"The times are not steady (the same work, done twice, differed in time by {spread:.2f}x), so nothing "
            "is recommended: run again while nothing else uses this device."
        )
        return Advice("none", "", headline, "", reasons, caveats[1:])
    if best is None:
        return Advice(
            "stay", reference["arm"], _stay(reference, others, like, enough), _flags(reference), reasons, caveats
        )
    rouge = best["rouge_l"]
    headline = (
        f"Use {describe(best)}: {_ratio(best, reference):.2f} times as many documents an hour as {reference['arm']}, "
        f"and, on these {rouge['documents']} documents, outputs like its own (ROUGE-L {rouge['mean']:.3f})."
    )
    return Advice("use", best["arm"], headline, _flags(best), reasons, caveats)


def describe(arm: Figures) -> str:
    """An arm in words."""
    if arm["preset"] == "dense":
        return f"dense attention in {arm['precision']}"
    asked = "" if arm["budget"] is None else f" with budget {arm['budget']:g}"
    return f"preset {arm['preset']}{asked} (density {arm['density']:.3f} here) in {arm['precision']}"


def _flags(arm: Figures) -> str:
    if arm["preset"] == "dense":
        return f"--attention dense --precision {arm['precision']}"
    budget = "" if arm["budget"] is None else f" --budget {arm['budget']:g}"
    return f"--preset {arm['preset']}{budget} --precision {arm['precision']}"


def _ratio(arm: Figures, reference: Figures) -> float:
    return arm["documents_per_hour"] / reference["documents_per_hour"] if reference["documents_per_hour"] else 0.0


def _obstacle(arm: Figures, limits: Limits) -> str:
    """Why the arm cannot be recommended whatever its speed; empty if it can."""
    if arm["failed"]:
        return f"{arm['failed']} of {arm['documents']} documents failed"
    if arm["preset"] != "dense" and not arm["sparse_documents"]:
        return "every document was short enough to be read densely, so it was not tried at all"
    if arm["token_agreement"] is None or arm["rouge_l"] is None:
        return "no document could be compared"
    agreement, rouge = arm["token_agreement"]["mean"], arm["rouge_l"]["mean"]
    if agreement < limits.agreement:
        asked = f"{limits.agreement:.1%} are asked for"
        return f"its outputs differ: it agrees with {agreement:.1%} of dense's tokens, {asked}"
    if rouge < limits.rouge:
        return f"its outputs differ: ROUGE-L {rouge:.3f}, {limits.rouge:g} is asked for"
    return ""


def _speed(arm: Figures, reference: Figures) -> str:
    first = arm["first_token_vs_reference"]
    told = "" if first is None else f", first token {first:.2f} times as fast"
    return f"{_ratio(arm, reference):.2f} times the documents an hour{told}"


def _reason(arm: Figures, reference: Figures, limits: Limits, enough: float) -> str:
    speed, obstacle = _speed(arm, reference), _obstacle(arm, limits)
    if obstacle:
        return f"{speed}; not recommended: {obstacle}."
    alike = f"agrees with {arm['token_agreement']['mean']:.1%} of dense's tokens, ROUGE-L {arm['rouge_l']['mean']:.3f}"
    slow = "" if _ratio(arm, reference) >= enough else "; not recommended: it is not faster"
    return f"{speed}; {alike}{slow}."


def _stay(reference: Figures, others: Sequence[Figures], like: Sequence[Figures], enough: float) -> str:
    stay = f"Stay with {describe(reference)}"
    if not others:
        return f"{stay}: nothing else was measured."
    fast = [arm for arm in others if _ratio(arm, reference) >= enough]
    if fast and like:
        return f"{stay}: what is faster here writes other outputs or failed, and what writes the same is not faster."
    if fast:
        return f"{stay}: what is faster here writes other outputs or failed. Other need not be worse: read both."
    return f"{stay}: nothing that was measured is faster on this device with documents of these lengths."


def _caveats(arms: Sequence[Figures], chosen: Figures, limits: Limits, total: int) -> list[str]:
    compared = max((arm["rouge_l"]["documents"] for arm in arms if arm["rouge_l"] is not None), default=0)
    found = []
    if compared >= total:
        found.append(f"All {total:,} documents of the input were compared; others may differ more.")
    elif compared:
        more = min(total, max(60, 4 * compared))
        found.append(
            f"{compared} of {total:,} documents were compared. Even if none of them had differed, up to "
            f"{unseen(compared, total):.0%} of all could (95% confidence); --sample {more} would tell more."
        )
    found += [text for text in (_open_interval(chosen, limits), _partly_dense(chosen)) if text]
    found.append(
        "Likeness to dense is not correctness: jobs.evaluate asks questions whose answers are known. Two outputs go "
        "their own ways after the first token that differs, so a near-tie can cost much ROUGE-L and no content."
    )
    return found


def _open_interval(arm: Figures, limits: Limits) -> str:
    for name, limit, what in (
        ("token_agreement", limits.agreement, "agreement of tokens"),
        ("rouge_l", limits.rouge, "ROUGE-L"),
    ):
        figure = arm[name]
        if figure is not None and figure["low"] is not None and figure["low"] < limit <= figure["mean"]:
            interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
            told = f"The {what} of {arm['arm']} is {figure['mean']:.3f}"
            return f"{told}, but its 95% interval, {interval}, reaches below {limit:g}."
    return ""


def _partly_dense(arm: Figures) -> str:
    done = arm["documents"] - arm["failed"]
    if arm["preset"] == "dense" or arm["sparse_documents"] == done:
        return ""
    return f"{arm['arm']} read {done - arm['sparse_documents']} of {done} documents densely: they are short enough."
