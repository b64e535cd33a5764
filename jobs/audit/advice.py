"""What to run, from the figures: the fastest arm whose outputs are like dense's, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.audit.figures import UNSTEADY, unseen, unsteadiness
from jobs.audit.options import Limits
from jobs.known.results import LEARNED

# An arm that makes so many more documents per hour is faster, if the same work did not take longer by more than that.
FASTER = 1.03
# Fewer documents compared than this recommend nothing, unless the input has no more: behind 20 that show no difference
# up to a seventh of all may differ (95%).
ENOUGH = 20
# Nor does an arm that may lose so great a share of known answers, as far as the interval tells.
UNSEEN_LOSS = 0.2

# What stands against arms that are faster, in the headline; the table of reasons says which.
_UNFIT = "writes other outputs, loses known answers or failed"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """verdict: "use" an arm other than the reference, "stay" with the reference, or "none": not to be told from this.

    arm: what the headline and the tiles beside it are about; empty where that is no single arm.
    flags: what to give jobs.summarize. reasons: (arm, the figures for and against it); caveats: what all this does not
    show.
    """

    verdict: str
    arm: str
    headline: str
    flags: str
    reasons: tuple[tuple[str, str], ...]
    caveats: tuple[str, ...]


def recommend(
    arms: Sequence[Figures], limits: Limits, total: int, *, random_weights: bool = False, why_none: str = ""
) -> Advice:
    """arms: records of figures.arm_figures(), the reference first. total: documents that the sample was drawn from.

    why_none: why there were no documents with known answers.
    """
    reference, others = arms[0], arms[1:]
    spread = unsteadiness(arms)
    enough = max(FASTER, spread)
    steady = f"The same work, done twice, differed in time by up to {spread:.2f}x: smaller differences mean nothing."
    if random_weights:
        headline = "Random weights: the speeds are real, the outputs mean nothing, so nothing is recommended."
        reasons = tuple((arm["arm"], _speed(arm, reference)) for arm in others)
        return Advice("none", "", headline, "", reasons, (steady,))
    reasons = tuple((arm["arm"], _reason(arm, reference, limits, enough, total)) for arm in others)
    like = [arm for arm in others if not _obstacle(arm, limits)]
    faster = [arm for arm in like if _ratio(arm, reference) >= enough]
    sure = [arm for arm in faster if not _too_few(arm, total)]
    best = max(sure, key=lambda arm: arm["documents_per_hour"], default=None)
    if best is not None:
        # Of arms that are equally fast, the one whose outputs are closest to dense's.
        best = max(
            (arm for arm in sure if arm["documents_per_hour"] * enough >= best["documents_per_hour"]),
            key=lambda arm: (arm["rouge_l"]["mean"], arm["token_agreement"]["mean"], arm["documents_per_hour"]),
        )
    caveats = (steady, *_caveats(arms, best or reference, limits, total, why_none))
    if spread > UNSTEADY:
        headline = (
            f"The times are not steady (the same work, done twice, differed in time by {spread:.2f}x), so nothing "
            "is recommended: run again while nothing else uses this device."
        )
        return Advice("none", "", headline, "", reasons, caveats[1:])
    if best is None and faster:
        most = max(faster, key=lambda arm: arm["documents_per_hour"])
        headline = f"Not enough documents to recommend {describe(most)}: {_too_few(most, total)}."
        return Advice("none", most["arm"], headline, "", reasons, caveats)
    if best is None:
        return Advice(
            "stay", reference["arm"], _stay(reference, others, like, enough), _flags(reference), reasons, caveats
        )
    rouge = best["rouge_l"]
    headline = (
        f"Use {describe(best)}: {_ratio(best, reference):.2f} times as many documents per hour as {reference['arm']}, "
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
    if not _tried(arm):
        return "every document was short enough to be read densely, so it was not tried at all"
    if arm["token_agreement"] is None or arm["rouge_l"] is None:
        return "no document could be compared"
    agreement, rouge = arm["token_agreement"]["mean"], arm["rouge_l"]["mean"]
    if agreement < limits.agreement:
        asked = f"{limits.agreement:.1%} are asked for"
        return f"its outputs differ: it agrees with {agreement:.1%} of dense's tokens, {asked}"
    if rouge < limits.rouge:
        return f"its outputs differ: ROUGE-L {rouge:.3f}, {limits.rouge:g} is asked for"
    for name, gap in _judged(arm):
        if gap["mean"] < -limits.lost:
            told = f"it loses {-100 * gap['mean']:.0f} points of {name}, of which dense finds {gap['dense']:.0%}"
            return f"{told} ({gap['n']} asked; 95%: {100 * gap['low']:+.0f} to {100 * gap['high']:+.0f} points)"
    return ""


def _tried(arm: Figures) -> bool:
    """Whether the arm read any document as it is meant to: Stem reads short ones densely."""
    return arm["preset"] == "dense" or arm["sparse_documents"] > 0


def _judged(arm: Figures) -> list[tuple[str, Figures]]:
    """What is known and dense finds: where it finds little itself, nothing can be lost."""
    return [(name, gap) for name, gap in arm["known"].items() if gap["dense"] >= LEARNED]


def _too_few(arm: Figures, total: int) -> str:
    """Why more documents are needed before the arm can be recommended; empty if there were enough."""
    compared = arm["rouge_l"]["documents"]
    if compared < min(ENOUGH, total):
        return f"{compared} were compared, {min(ENOUGH, total)} are needed (--sample {min(ENOUGH, total)})"
    for name, gap in _judged(arm):
        if gap["low"] < -UNSEEN_LOSS:
            return (
                f"up to {-100 * gap['low']:.0f} points of {name} may be lost unseen in {gap['documents']} documents "
                f"with known answers (--known {4 * gap['documents']})"
            )
    return ""


def _speed(arm: Figures, reference: Figures) -> str:
    first = arm["first_token_vs_reference"]
    told = "" if first is None else f", first token {first:.2f} times as fast"
    return f"{_ratio(arm, reference):.2f} times the documents per hour{told}"


def _reason(arm: Figures, reference: Figures, limits: Limits, enough: float, total: int) -> str:
    speed, obstacle = _speed(arm, reference), _obstacle(arm, limits)
    if obstacle:
        return f"{speed}; not recommended: {obstacle}."
    alike = f"agrees with {arm['token_agreement']['mean']:.1%} of dense's tokens, ROUGE-L {arm['rouge_l']['mean']:.3f}"
    alike += "".join(f", {100 * gap['mean']:+.0f} points of {name}" for name, gap in _judged(arm))
    slow = "" if _ratio(arm, reference) >= enough else "; not recommended: it is not faster"
    few = _too_few(arm, total)
    return f"{speed}; {alike}{slow}{f'; not enough documents: {few}' if few and not slow else ''}."


def _stay(reference: Figures, others: Sequence[Figures], like: Sequence[Figures], enough: float) -> str:
    stay = f"Stay with {describe(reference)}"
    if not others:
        return f"{stay}: nothing else was measured."
    tried = [arm for arm in others if _tried(arm)]
    if not tried:
        return f"{stay}: every document was short enough to be read densely, so Stem was not tried at all."
    fast = [arm for arm in tried if _ratio(arm, reference) >= enough]
    if fast and like:
        return f"{stay}: what is faster here {_UNFIT}, and what is as good is not faster."
    if fast:
        return f"{stay}: what is faster here {_UNFIT}. Other outputs need not be worse: read both."
    return f"{stay}: nothing that was measured is faster on this device with documents of these lengths."


def _caveats(arms: Sequence[Figures], chosen: Figures, limits: Limits, total: int, why_none: str) -> list[str]:
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
    if chosen is not arms[0]:  # whose likeness is that of two runs of itself
        found += [text for text in (_open_interval(chosen, limits), _partly_dense(chosen)) if text]
    if not any(_judged(arm) for arm in arms):
        why = why_none or "dense attention does not find them itself"
        found.append(f"Nothing is known of lookups inside a document, which sparse attention loses first: {why}.")
    found.append(
        "Two outputs go their own ways after the first token that differs, so a near-tie can cost much ROUGE-L and no "
        "content."
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
