"""The audit as a page: what to run first, then the figures, then the outputs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.audit.advice import describe
from jobs.audit.charts import agreement_chart, first_token_chart, speedup_chart
from jobs.audit.figures import FEWEST, UNSTEADY, unsteadiness
from jobs.audit.measure import counted
from jobs.audit.results import AuditRow
from jobs.page import Block, Details, KeyFigure, KeyFigures, Prose, Section, SideBySide, Table, render_page
from jobs.page.blocks import Cell
from jobs.page.numbers import NOTHING, binary_bytes, figure, seconds, share

Figures = dict[str, Any]
# More rows than this are folded.
SHORT_TABLE = 12
# Pairs of outputs of an arm that are open.
OPEN = 2


def page(audit: dict[str, Any], rows: Sequence[AuditRow]) -> str:
    """The whole page as HTML. audit: what audit.json holds."""
    sections = [
        *short_sections(audit),
        Section("Documents that differ most", _differing(audit, rows)),
        Section("Time", _speed(audit)),
        Section("Likeness to dense", _likeness(audit, rows)),
        Section("Every document", _documents(rows)),
        Section("How it was measured", _method(audit)),
    ]
    return render_page("Audit: dense attention and Stem on your documents", subtitle(audit), sections, footer(audit))


def subtitle(audit: dict[str, Any]) -> str:
    """Model, device and documents in a line."""
    stamp, sample = audit["stamp"], audit["sample"]
    device = stamp.get("gpu", stamp["device"])
    return (
        f"{audit['model']} on {device}; {sample['documents']} of {sample['of']:,} documents, "
        f"{min(sample['prompt_tokens']):,} to {max(sample['prompt_tokens']):,} prompt tokens"
    )


def footer(audit: dict[str, Any]) -> str:
    """When, and by which command."""
    return f"{audit['stamp']['measured_at']}, commit {audit['stamp']['commit']}: {audit['command']}"


def short_sections(audit: dict[str, Any]) -> list[Section]:
    """What a terminal shows too: the advice and one line for each arm."""
    advice = audit["advice"]
    blocks: list[Block] = [Prose(f"{verdict(audit)}\n\n{advice['headline']}")]
    if advice["flags"]:
        blocks.append(Prose(f"In a job: python -m jobs.summarize ... {advice['flags']}"))
    blocks += [_key_figures(audit), _overview(audit)]
    refused = [(name, f"could not run: {why}") for name, why in audit["refused"]]
    reasons = [*advice["reasons"], *refused]
    if reasons:
        blocks.append(Table(("arm", f"against {audit['arms'][0]['arm']}"), reasons))
    blocks.append(Prose("\n\n".join(advice["caveats"])))
    return [Section("In short", blocks)]


def verdict(audit: dict[str, Any]) -> str:
    """The advice for those who know their documents and not the words of this trade."""
    advice = audit["advice"]
    if advice["verdict"] == "none":
        return "Whether reading less of each document pays here is still open. What is missing:"
    if advice["verdict"] == "stay":
        return "Go on reading every document in full: nothing that was tried is faster here and writes nearly the same."
    reference = audit["arms"][0]
    arm = next(each for each in audit["arms"] if each["arm"] == advice["arm"])
    faster = arm["documents_per_hour"] / reference["documents_per_hour"]
    same, alike = arm["exact_match"], arm["rouge_l"]
    skips = "" if arm["preset"] == "dense" else f", which skips {1 - arm['density']:.0%} of the comparisons of words,"
    return (
        f"Yes, switch. {arm['arm']}{skips} does {faster:.2f} times the work in the same time and writes nearly the "
        "same: "
        f"{of_documents(same)} outputs are the same word for word, and on average {alike['mean']:.1%} of the words are "
        "the same in the same order. Read the pairs below before you trust that."
    )


def _key_figures(audit: dict[str, Any]) -> KeyFigures:
    """Of the arm that the headline is about, or else of the fastest one besides the reference, which is then said."""
    reference, others = audit["arms"][0], audit["arms"][1:]
    chosen = [arm for arm in others if arm["arm"] == audit["advice"]["arm"]]
    arm = chosen[0] if chosen else max(others, key=lambda a: a["documents_per_hour"], default=reference)
    recommended = audit["advice"]["verdict"] == "use" or arm is reference
    shown = arm["arm"] if recommended else f"{arm['arm']}, not recommended"
    hours = arm["documents_per_hour"], reference["documents_per_hour"]
    ratio = hours[0] / hours[1] if hours[1] else None
    figures = [
        KeyFigure(
            "First token",
            times(arm["first_token_vs_reference"]),
            f"{shown}: density {figure(arm['density'])}, against {reference['arm']}",
        ),
        KeyFigure(
            "Documents per hour", times(ratio), f"{figure(hours[0])}, dense {figure(hours[1])}", _tone(ratio, audit)
        ),
    ]
    if arm["token_agreement"] is not None and not audit["random_weights"]:
        figures += [
            KeyFigure(
                "Tokens that agree", share(arm["token_agreement"]["mean"]), interval(arm["token_agreement"], share)
            ),
            KeyFigure("ROUGE-L", figure(arm["rouge_l"]["mean"]), interval(arm["rouge_l"])),
            KeyFigure("Same output", of_documents(arm["exact_match"]), interval(arm["exact_match"], share)),
        ]
    return KeyFigures(figures)


def _tone(ratio: float | None, audit: dict[str, Any]) -> Any:
    if ratio is None or audit["advice"]["verdict"] != "use" or 0.97 < ratio < 1.03:
        return ""
    return "good" if ratio > 1 else "bad"


def times(ratio: float | None) -> str:
    """A ratio of times."""
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def interval(found: dict[str, Any] | None, how: Any = figure) -> str:
    """The 95% interval of a figure and over how many documents. how: a number to text."""
    if found is None:
        return NOTHING
    if found["low"] is None:
        return f"{counted(found['documents'])}, too few for an interval"
    return f"95% interval {how(found['low'])} to {how(found['high'])}, {counted(found['documents'])}"


def of_documents(found: dict[str, Any] | None) -> str:
    """A share as k of n documents."""
    return NOTHING if found is None else f"{round(found['mean'] * found['documents'])} of {found['documents']}"


def _overview(audit: dict[str, Any]) -> Table:
    rows = [
        (
            arm["arm"], figure(arm["density"]), seconds(arm["first_token_seconds"]),
            figure(arm["first_token_vs_dense"]), figure(arm["mean_decode_step_ms"], "ms"),
            figure(arm["documents_per_hour"]), _mean(arm["token_agreement"], share), _mean(arm["rouge_l"], figure),
        )
        for arm in audit["arms"]
    ]  # fmt: skip
    header = (
        "arm", "density", "first token", "times dense", "decode step", "docs/hour", "tokens agree", "ROUGE-L",
    )  # fmt: skip
    reference = audit["arms"][0]["arm"]
    note = (
        "An arm is one way to run: an attention (@ stands for --budget) in a precision. Means over documents. "
        "Density: share of the attention that was computed, 1 is all. Times dense: how many times as fast first tokens "
        "came as under dense attention in the same precision. Tokens agree: share of the tokens of dense's answer that "
        "the arm would have written, too. ROUGE-L: share of the words that both outputs have in the same order. Both "
        f"are against {reference}, whose own line compares two runs of it. Below, lookups and questions ask for facts "
        "that were put into texts, so that the answers are known."
    )
    return Table(header, rows, "", note)


def _mean(found: dict[str, Any] | None, how: Any) -> str:
    return NOTHING if found is None else how(found["mean"])


def _speed(audit: dict[str, Any]) -> list[Block]:
    arms = audit["arms"]
    on_gpu = any(arm["peak_bytes"] for arm in arms)
    rows: list[list[str]] = []
    for arm in arms:
        alone = arm["decode_step_alone"]
        row = [arm["arm"], seconds(arm["seconds"]), figure(arm["prompt_tokens_per_second"])]
        row += [figure(arm["output_tokens_per_second"]), figure(alone["step_ms"] if alone else None, "ms")]
        row += [binary_bytes(arm["plan"]["weight_bytes"]), *([binary_bytes(arm["peak_bytes"])] if on_gpu else [])]
        rows.append([*row, seconds(arm["load_seconds"]), figure(_repeat(arm))])
    header = ["arm", "all documents", "prompt tokens/s", "output tokens/s", "decode step alone", "weights"]
    header += [*(["peak memory"] if on_gpu else []), "loading", "repeat"]
    note = (
        "All documents: prefill and decoding of the whole sample, as one job of one engine. Decode step alone: one "
        f"document of {max(audit['sample']['prompt_tokens']):,} tokens. Loading: the first arm in a precision loads "
        "the model, the others only plan their memory. Repeat: by what factor two times of the same work differed, all "
        "documents in the first arm, the shortest one's prefill in the others."
    )
    if on_gpu:
        note += " Peak memory: with the KV arena, which takes what is free."
    blocks: list[Block] = [Table(header, rows, "", note), *first_token_chart(arms), *speedup_chart(arms)]
    crossings = [(arm["arm"], crossing(arm["crossover"])) for arm in arms if arm["crossover"] is not None]
    if crossings and unsteadiness(arms) > UNSTEADY:
        blocks.append(Prose("From which length Stem is not slower cannot be told: the times are not steady."))
    elif crossings:
        blocks.append(
            Table(("arm", "not slower than dense in the same precision"), crossings, "Crossover on this device")
        )
    return blocks


def _repeat(arm: Figures) -> float | None:
    pair = arm["repeat_seconds"]
    return max(pair) / min(pair) if pair else None


def crossing(found: dict[str, Any]) -> str:
    """The crossover in words."""
    if found["shortest"] is None:
        return "never tried: every prompt was short enough to be read densely"
    if found["tokens"] is None:
        return f"at no measured length: still slower at {found['slower']:,} tokens, the longest"
    if found["slower"] is None:
        return f"wherever it is sparse, measured from {found['tokens']:,} tokens on"
    return f"from {found['tokens']:,} tokens on; at {found['slower']:,} it is slower"


def _likeness(audit: dict[str, Any], rows: Sequence[AuditRow]) -> list[Block]:
    reference = audit["arms"][0]
    if audit["random_weights"]:
        told = "The weights are random: how outputs differ says nothing about a trained model."
    else:
        told = (
            "First token, KL and agreement are measured along dense's own answer, which each arm reads token by token; "
            "ROUGE-L and same output compare what each arm writes by itself, greedily. Intervals: 95%, over documents."
        )
    names = (
        ("first token agrees", "first_token_agrees"), ("KL of the first token", "first_token_kl"),
        ("KL along the answer", "answer_kl"), ("tokens that agree", "token_agreement"), ("ROUGE-L", "rouge_l"),
        ("same output", "exact_match"),
    )  # fmt: skip
    table = [(what, *(_value(arm[name], name) for arm in audit["arms"])) for what, name in names]
    header = ("", *(arm["arm"] for arm in audit["arms"]))
    note = (
        f"Mean (95% interval) over the documents, against {reference['arm']}. KL: how far two predictions of the next "
        f"token are apart, in nats; 0: not at all. Fewer than {FEWEST} documents have no interval of a mean."
    )
    return [Prose(told), Table(header, table, "", note), *_known(audit), *agreement_chart(rows, audit["arms"])]


def _known(audit: dict[str, Any]) -> list[Block]:
    """What dense finds of known answers, and how many points of it each arm loses or wins."""
    if not audit["known"]:
        return [Prose(f"No answers were known: {audit['why_none']}.")]
    reference, *others = audit["arms"]
    rows = []
    for name, dense in reference["known"].items():
        gaps = [arm["known"][name] for arm in others]
        told = [f"{100 * g['mean']:+.1f} ({100 * g['low']:+.1f} to {100 * g['high']:+.1f})" for g in gaps]
        rows.append((name, f"{dense['dense']:.1%} of {dense['n']}", *told))
    note = (
        f"{counted(audit['known'])} as long as the longest prompt, made of real text into which facts were woven. "
        "Lookups: values expected where the document states them again; questions: asked at the end. Of the others the "
        "difference to it in points, with the 95% interval."
    )
    return [Table(("known answers", *(arm["arm"] for arm in audit["arms"])), rows, "", note)]


def _value(found: dict[str, Any] | None, name: str) -> str:
    if found is None:
        return NOTHING
    told = of_documents(found) if name in ("first_token_agrees", "exact_match") else figure(found["mean"])
    return told if found["low"] is None else f"{told} ({figure(found['low'])} to {figure(found['high'])})"


def _differing(audit: dict[str, Any], rows: Sequence[AuditRow]) -> list[Block]:
    """By arm, the documents with the least ROUGE-L, the first of them open; those that are the same, too."""
    reference = audit["arms"][0]["arm"]
    dense = {row.document_id: row for row in rows if row.arm == reference}
    blocks: list[Block] = []
    for arm in audit["arms"][1:]:
        own = [(row, row.output_likeness) for row in rows if row.arm == arm["arm"] and row.output_likeness is not None]
        own.sort(key=lambda item: (item[1].rouge_l, -_answer_kl(item[0]), item[0].document_id))
        if own and all(alike.exact_match for _, alike in own):
            blocks.append(Prose(f"With {describe(arm)} all outputs that were compared are the same as dense's."))
        for place, (row, alike) in enumerate(own[: audit["show"]]):
            told = (
                f"{row.arm}: {row.document_id}, {row.from_engine.prompt_tokens:,} tokens, ROUGE-L {alike.rouge_l:.3f}, "
                f"{'the same output' if alike.exact_match else differs_where(alike.same_tokens)}"
            )
            other = dense[row.document_id]
            texts = [
                (f"{name}, {each.from_engine.output_tokens} tokens", each.outcome.output or "")
                for name, each in ((reference, other), (row.arm, row))
            ]
            blocks.append(SideBySide(texts, told) if place < OPEN else Details(told, [SideBySide(texts)]))
    return [*_asked(audit), *(blocks or [Prose("Nothing was compared.")])]


def differs_where(equal: int) -> str:
    """Where an output differs from dense's: behind `equal` leading tokens that both have."""
    if not equal:
        return "differs from the first token on"
    return f"differs after {equal:,} equal token{'s' * (equal != 1)}"


def _asked(audit: dict[str, Any]) -> list[Block]:
    """What the outputs answer, if the audit says so: one by an earlier version does not."""
    if "question" not in audit:
        return []
    first = f", the first of {audit['questions']} questions" if audit["questions"] > 1 else ""
    return [Prose(f'Asked of each document{first}: "{audit["question"]}"')]


def _documents(rows: Sequence[AuditRow]) -> list[Block]:
    header = (
        "document", "arm", "prompt tokens", "density", "first token", "decode step", "output tokens", "KL, first token",
        "KL, answer", "tokens that agree", "ROUGE-L", "same output",
    )  # fmt: skip
    table = Table(
        header,
        [
            (
                row.document_id, row.arm, row.from_engine.prompt_tokens, figure(row.from_engine.density),
                seconds(row.first_token_seconds), figure(row.decode_step_ms, "ms"), row.from_engine.output_tokens,
                *_likeness_cells(row),
            )
            for row in rows
        ],
    )  # fmt: skip
    return [table] if len(rows) <= SHORT_TABLE else [Details(f"{len(rows)} rows", [table])]


def _likeness_cells(row: AuditRow) -> tuple[Cell, ...]:
    alike, output = row.likeness, row.output_likeness
    along: tuple[Cell, ...] = (None, None, share(None))
    if alike is not None:
        along = alike.first_token_kl, alike.answer_kl, share(alike.token_agreement)
    same: Cell = output.exact_match if output else None
    if row.outcome.status != "ok":
        same = f"{row.outcome.status}: {row.outcome.error}"
    return (*along, figure(output.rouge_l if output else None), same)


def _answer_kl(row: AuditRow) -> float:
    return row.likeness.answer_kl if row.likeness else 0.0


def _method(audit: dict[str, Any]) -> list[Block]:
    sample, stamp = audit["sample"], audit["stamp"]
    told = (
        f"{sample['documents']} documents, drawn with seed {sample['seed']}: all {sample['of']:,} (but for unreadable "
        "ones) were ordered by size and cut into equal shares, and each share gave one. Every arm got the same "
        f"prompts, at most {audit['max_new_tokens']} new tokens each, greedily, in one engine, all at "
        "once; one arm's memory is given back before the next begins. "
        f"{audit['arms'][0]['arm']} ran twice: its first run gives the outputs that all are compared with, the second "
        "is timed, and both had to write the same tokens, but for ties within rounding. No time includes the reading "
        "along of dense's answer."
    )
    blocks: list[Block] = [Prose(told)]
    if audit["refused"]:
        blocks.append(Table(("arm", "why it could not run"), audit["refused"], "Asked for, but not measured"))
    if sample["left_out"]:
        blocks.append(Table(("document", "why it was left out"), sample["left_out"], "Drawn, but not compared"))
    engines = [
        (arm["arm"], ", ".join(f"{name}: {kernel}" for name, kernel in arm["engine"]["kernels"].items()))
        for arm in audit["arms"]
    ]
    blocks.append(Table(("arm", "kernels"), engines))
    blocks.append(Table(("what", "as it was"), [(name, str(value)) for name, value in stamp.items()]))
    presets = [
        (arm["arm"], str(arm["engine"]["attention_config"])) for arm in audit["arms"] if arm["preset"] != "dense"
    ]
    return [*blocks, Details("Settings of the sparse arms", [Table(("arm", "attention"), presets)])]
