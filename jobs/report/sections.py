"""Measures to the sections of a report; the page and the terminal show the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from jobs.page import Block, Details, Section, Table
from jobs.page.blocks import Cell
from jobs.page.numbers import count, figure, seconds, share
from jobs.page.outputs import Outputs
from jobs.report import charts
from jobs.report.layers import TITLE, layer_chart, layer_table
from jobs.report.measures import FAILED, SLOWEST, Measures
from jobs.report.overview import overview, states_of
from jobs.report.results import Run
from pipeline.results.rows import STATUSES
from pipeline.settings.config import JobConfig

PLACES = ("input", "output", "model")
START = "What the job's last run did, one after the other, until its first worker took documents."
# Header -> the name of a figure, or what makes the cell.
Columns = dict[str, str | Callable[[Measures], Cell]]


def sections(
    runs: Sequence[Run], measures: Sequence[Measures], *, with_charts: bool, outputs: Outputs | None = None
) -> list[Section]:
    """The report, what people wrote for first: the outputs. Without charts plotly is not needed.

    Raises JobError if it is, and is missing.
    """
    states, figures = states_of(measures), overview(measures)
    parts = [Section("Overview", [*states, *figures])]
    if outputs is not None and outputs.entries:
        title = "Outputs" if len(runs) == 1 else "Outputs side by side"
        told = [] if all(run["state"] == "finished" and not run["without_row"] for run in measures) else states
        parts = [Section(title, [*told, outputs]), Section("Figures", figures)]
    if any(run["failed"] for run in measures):
        reasons, documents = _failures(measures)
        parts.append(Section("Failures", [reasons] if outputs is not None else [reasons, documents]))
    if any(run["ok"] for run in measures):
        parts.append(Section("Latency by length", _latency(runs, measures, with_charts)))
        parts.append(Section("Time and throughput", _time(runs, measures, with_charts)))
        memory = charts.memory_chart(runs) if with_charts else None
        parts.append(Section("Memory", [memory] if memory else []))
        parts.append(Section("Attention", _attention(runs, measures, with_charts)))
        parts.append(Section(f"Slowest {_what(measures)}", [_slowest(measures)]))
    parts.append(Section("Configuration and versions", _configuration(measures)))
    return [section for section in parts if section.blocks]


def _failures(measures: Sequence[Measures]) -> tuple[Table, Table]:
    """Reasons, and documents, of which a list of outputs tells more."""
    reasons = _table(
        measures,
        "reasons",
        {
            "status": "status",
            _what(measures): "documents",
            "error, of one of them": lambda item: item["example"] or STATUSES.get(item["status"], ""),
        },
        title="Reasons",
        note="Errors that differ in their numbers alone are counted as one. Statuses: "
        + "; ".join(f"{name}: {STATUSES[name].split(';')[0]}" for name in _statuses(measures)) + ".",
    )  # fmt: skip
    documents = _table(
        measures,
        "failures",
        {
            "document": "document_id",
            **_question(measures),
            "status": "status",
            "error": "error",
            "attempts": "attempts",
            "prompt tokens": "prompt_tokens",
            "source": "source",
        },
        title=f"Failed {_what(measures)}",
        note=f"The first {FAILED} of a run; all are in its Parquet files, where status is not ok."
        if any(run["failed"] > FAILED for run in measures)
        else "",
    )
    return reasons, documents


def _what(measures: Sequence[Measures]) -> str:
    """What rows are: documents, or where a run has several questions, answers."""
    return "answers" if any(run["questions"] > 1 for run in measures) else "documents"


def _question(measures: Sequence[Measures]) -> Columns:
    """A column that tells answers to the same document apart."""
    return {"question": "question_id"} if _what(measures) == "answers" else {}


def _statuses(measures: Sequence[Measures]) -> list[str]:
    found = {status for run in measures for status in run["counts"]}
    return [status for status in STATUSES if status in found and status != "ok"]


def _latency(runs: Sequence[Run], measures: Sequence[Measures], with_charts: bool) -> list[Block]:
    chart = charts.latency_chart(runs, measures) if with_charts else None
    first, total = "time_to_first_token", "total_seconds"
    columns: Columns = {
        "prompt tokens": lambda item: charts.length_label(item["from_tokens"], item["to_tokens"]),
        _what(measures): "documents",
        "first token p50": lambda item: seconds((item[first] or {}).get("p50")),
        "first token p95": lambda item: seconds((item[first] or {}).get("p95")),
        "prefill, tokens/s": lambda item: count(item["prefill_tokens_per_second"]),
        "in the worker p50": lambda item: seconds((item[total] or {}).get("p50")),
        "in the worker p95": lambda item: seconds((item[total] or {}).get("p95")),
        "density": lambda item: figure(item["density"]["mean"] or (1.0 if item["documents"] else None)),
    }
    table = _table(
        measures, "by_length", columns, side_by_side=True,
        note=f"{_what(measures).capitalize()} that are ok. The time in the worker begins when it takes the document "
        "and holds all waiting there. Density is the mean of those that ran sparse. K is 1,024 tokens.",
    )  # fmt: skip
    return [*([chart] if chart else []), table]


def _time(runs: Sequence[Run], measures: Sequence[Measures], with_charts: bool) -> list[Block]:
    several = len(measures) > 1
    groups = [(run["name"], run["phase_seconds"], run["ok"]) for run in measures]
    names = {name: label for name, label in charts.PHASE_NAMES.items() if any((g[1] or {}).get(name) for g in groups)}
    rows = [[label, *(_phase(phases, name) for _, phases, _ in groups)] for name, label in names.items()]
    table = Table(
        ("", *(label if several else f"all {_what(measures)}" for label, _, _ in groups)), rows,
        note=f"Seconds of all {_what(measures)} that are ok together; those that a worker holds at the same time "
        "overlap.",
    )  # fmt: skip
    if not with_charts or not rows:
        return [table] if rows else []
    bars = groups
    if not several:
        ranges = [item for item in measures[0]["by_length"] if item["documents"]]
        bars = [
            (charts.length_label(item["from_tokens"], item["to_tokens"]), item["phase_seconds"], item["documents"])
            for item in ranges
        ]
    split = charts.phases_chart(bars, answers=_what(measures) == "answers") if bars else None
    over_time = charts.throughput_chart(runs)
    return [block for block in (split, table, over_time) if block]


def _phase(phases: dict[str, float] | None, name: str) -> str:
    if not phases:
        return "-"
    return f"{seconds(phases[name])} ({share(phases[name] / max(sum(phases.values()), 1e-9))})"


def _attention(runs: Sequence[Run], measures: Sequence[Measures], with_charts: bool) -> list[Block]:
    chart = charts.density_chart(runs) if with_charts else None
    by_layer = layer_table(measures, charts.length_label, "The same in figures" if with_charts else TITLE)
    maps = [layer_chart(run, charts.length_label, several=len(runs) > 1) for run in measures] if with_charts else []
    columns: Columns = {
        "attention": "attention",
        "precision": "precision",
        "device": "gpu",
        "kernel": "kernel",
        "why not as asked for, of one of them": "attention_reason",
        _what(measures): "documents",
    }
    ran = _table(measures, "ran", columns, title=f"How the {_what(measures)} ran")
    return [block for block in (chart, *maps, by_layer, ran) if block]


def _slowest(measures: Sequence[Measures]) -> Table:
    columns: Columns = {
        "document": "document_id",
        **_question(measures),
        "prompt tokens": "prompt_tokens",
        "generated": "output_tokens",
        "in the worker": lambda item: seconds(item["total_seconds"]),
        "waiting": lambda item: seconds(item["queue_seconds"]),
        "prefill": lambda item: seconds(item["prefill_seconds"]),
        "decode": lambda item: seconds(item["decode_seconds"]),
        "density": lambda item: figure(item["density"]),
    }
    note = f"The {SLOWEST} {_what(measures)} of a run that took longest in the worker, without what they waited there."
    return _table(measures, "slowest", columns, note=note)


def _table(
    measures: Sequence[Measures], key: str, columns: Columns, *,
    side_by_side: bool = False, title: str = "", note: str = "",
) -> Table:  # fmt: skip
    """A row for each of the items under `key`, with the run's name in front if there are several runs.

    side_by_side: the first items of all runs, then the second ones, and so on. A column in which no row has anything is
    left out, and a row of a range of lengths without documents.
    """
    items = [
        (at, run["name"], item) for run in measures for at, item in enumerate(run[key]) if item.get("documents") != 0
    ]
    if side_by_side:
        items.sort(key=lambda item: item[0])
    rows: list[list[Cell]] = [
        [name, *(item[value] if isinstance(value, str) else value(item) for value in columns.values())]
        for _, name, item in items
    ]
    header = ["run", *columns]
    used = [
        at for at in range(len(header))
        if (at or len(measures) > 1) and (not rows or any(row[at] not in (None, "", "-") for row in rows))
    ]  # fmt: skip
    return Table([header[at] for at in used], [[row[at] for at in used] for row in rows], title, note)


def _configuration(measures: Sequence[Measures]) -> list[Block]:
    configs = [run["config"] or {} for run in measures]
    names = [run["name"] for run in measures] if len(measures) > 1 else ["value"]
    blocks: list[Block] = []
    if any(configs):
        defaults = {item.name: _plain(item.default) for item in fields(JobConfig)}
        settings = list(dict.fromkeys(name for config in configs for name in config))
        if len(measures) > 1:
            chosen = [name for name in settings if len({_plain(config.get(name)) for config in configs}) > 1]
            title = "Settings that differ"
        else:
            chosen = [name for name in settings if name in PLACES or _plain(configs[0][name]) != defaults.get(name)]
            title = "Settings other than the defaults"
        rows = [[name, *(_plain(config.get(name)) for config in configs)] for name in settings]
        blocks.append(Table(("setting", *names), [row for row in rows if row[0] in chosen], title))
        blocks.append(Details("All settings", [Table(("setting", *names), rows)]))
    told = "A later run goes on in this folder only if all but the input's are as they were."
    for title, key, head, note in (
        ("Start, seconds", "start_seconds", "part", START),
        ("Versions", "versions", "package", ""),
        ("Fingerprints", "fingerprints", "of", told),
    ):
        found = [run[key] or {} for run in measures]
        labels = list(dict.fromkeys(name for about in found for name in about))
        if labels:
            rows = [[name, *(_plain(about.get(name)) for about in found)] for name in labels]
            blocks.append(Table((head, *names), rows, title, note))
    return blocks


def _plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, str):
        return value
    if value is None or value in ((), [], {}):
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else json.dumps(value, default=str)
