"""What the rows say: as a table and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jobs.evaluate.rows import setting_key
from jobs.known.estimates import Estimate, estimate, mean, paired
from jobs.known.results import BY_EXACTNESS, LEARNED, Row, question_key

# Pooled as "retrieval"; these are told apart, since they ask for more than one place of the prompt, or before its end.
APART = ("lookup", "summary", "variable_tracking", "common_words", "frequent_words")
TEXT_TASKS = ("text inside", "text behind")
DENSE_NOTE = (
    "Recall is the share of the answers that were found, in brackets its 95% interval; then the number of questions. "
    "niah, multi...: values hidden in a document, one or several of them; report_facts: figures that a report states "
    "once; lookup: the same, where it states them again; summary: its key findings in order."
)
ARMS_NOTE = "Density: share of the attention that was computed, 1 is all. Seconds: to read a document, median."
RECALL_NOTE = (
    "Against dense: points of recall more or less than dense on the same questions, with the 95% interval. retrieval: "
    "all that is asked at the end of a document; lookup: values that the document states again."
)
PREDICTION_NOTE = (
    "KL: how far the predictions of the next token are from dense's, in nats; 0: not at all. Same first: share of "
    "the tokens that both put first. NLL: how much worse than by dense the text itself is predicted. Inside: within a "
    "text; behind: after its end, where an answer would be; lookup: where a value comes again; answer: at its first "
    "token."
)


def group(row: Row) -> str:
    """Where a row is counted: "retrieval" or a task of its own."""
    return row["task"] if row["task"] in (*APART, *TEXT_TASKS) else "retrieval"


def baseline(rows: Sequence[Row]) -> list[Row]:
    """The rows of dense that all others are compared with: those of the most exact precision."""
    dense = [row for row in rows if row["arm"] == "dense"]
    best = min((BY_EXACTNESS.index(row["precision"]) for row in dense), default=0)
    return [row for row in dense if BY_EXACTNESS.index(row["precision"]) == best]


def dense_recall(rows: Sequence[Row]) -> dict[tuple[int, str], Estimate]:
    """Recall of dense by (length, task)."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in baseline(rows):
        if row["recall"] is not None:
            found.setdefault((row["length"], row["task"]), []).append(row)
    return {key: estimate([r["recall"] for r in each], [r["document"] for r in each]) for key, each in found.items()}


def unlearned_tasks(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """(length, task) that the model does not do well enough when dense."""
    return {key for key, found in dense_recall(rows).items() if found.mean < LEARNED}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain values for a JSON file: the dense recall of each task, and one record for each setting."""
    unlearned = unlearned_tasks(rows)
    dense = {question_key(row): row for row in baseline(rows)}
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(setting_key(row), []).append(row)
    order = sorted(settings, key=lambda key: (key[0], BY_EXACTNESS.index(key[3])))  # arms as they were asked for
    return {
        "dense_recall": [
            {"length": length, "task": task, "recall": found.mean, **asdict(found)}
            for (length, task), found in sorted(dense_recall(rows).items())
        ],
        "left_out": sorted([list(key) for key in unlearned]),
        "settings": [_setting(settings[key], dense, unlearned) for key in order],
        "precisions": _precisions([row for row in rows if (row["length"], row["task"]) not in unlearned]),
    }


def _setting(rows: Sequence[Row], dense: dict[tuple[Any, ...], Row], unlearned: set[tuple[int, str]]) -> dict[str, Any]:
    asked = [row for row in rows if row["recall"] is not None]
    counted = [row for row in asked if (row["length"], row["task"]) not in unlearned]
    record: dict[str, Any] = {name: rows[0][name] for name in ("length", "arm", "precision", "block_size", "config")}
    record |= {name: float(np.mean([row[name] for row in rows])) for name in ("density", "mean_density")}
    record["prefill_seconds"] = float(np.median([*{row["document"]: row["prefill_seconds"] for row in rows}.values()]))
    record["recall"] = {
        name: _against([row for row in counted if group(row) == name], dense) for name in sorted({*map(group, counted)})
    }
    record["tasks"] = {
        name: _against([row for row in asked if row["task"] == name], dense)
        for name in sorted({row["task"] for row in asked})
    }
    record["exact"] = {
        name: float(np.mean([row["exact"] for row in asked if row["task"] == name and row["exact"] is not None]))
        for name in sorted({row["task"] for row in asked if row["exact"] is not None})
    }
    record["predictions"] = {
        name: _predictions([row for row in rows if group(row) == name], dense)
        for name in sorted({*map(group, rows)} & {"retrieval", "lookup", *TEXT_TASKS})
    }
    return record


def _against(rows: Sequence[Row], dense: dict[tuple[Any, ...], Row]) -> dict[str, Any]:
    """Recall, and its difference to dense on the same questions where dense ran."""
    record: dict[str, Any] = asdict(estimate([row["recall"] for row in rows], [row["document"] for row in rows]))
    pairs = [(row, dense[question_key(row)]) for row in rows if question_key(row) in dense]
    if pairs and any(row is not other for row, other in pairs):
        record["to_dense"] = asdict(_recall_gap(pairs))
    return record


def _recall_gap(pairs: Sequence[tuple[Row, Row]]) -> Estimate:
    values, others = [row["recall"] for row, _ in pairs], [other["recall"] for _, other in pairs]
    return paired(values, others, [row["document"] for row, _ in pairs])


def _predictions(rows: Sequence[Row], dense: dict[tuple[Any, ...], Row]) -> dict[str, Any]:
    """KL to dense, top-1, and the loss of the text itself less dense's, each with an interval over documents."""
    pairs = [(row, dense[question_key(row)]) for row in rows if question_key(row) in dense]
    values = {
        "kl": [(row["kl"], row["document"]) for row in rows],
        "top1": [(row["top1"], row["document"]) for row in rows],
        "nll": [(row["nll"], row["document"]) for row in rows],
        "nll_to_dense": [(row["nll"] - o["nll"], row["document"]) for row, o in pairs if row["nll"] is not None],
    }
    known = {
        name: [(value, document) for value, document in found if value is not None] for name, found in values.items()
    }
    return {name: asdict(mean(*zip(*found, strict=True))) for name, found in known.items() if found}


def _precisions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How each arm in each precision differs from the same arm in the most exact one, question by question."""
    by_setting: dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], Row]]] = {}
    for row in rows:
        length, arm, config, precision = setting_key(row)
        by_setting.setdefault((length, arm, config), {}).setdefault(precision, {})[question_key(row)] = row
    records = []
    for (length, arm, _), found in sorted(by_setting.items(), key=lambda item: item[0][0]):
        base, *others = sorted(found, key=BY_EXACTNESS.index)
        for precision in others:
            pairs = [(row, found[base][key]) for key, row in found[precision].items() if key in found[base]]
            asked = [pair for pair in pairs if pair[0]["recall"] is not None]
            groups = {"all": asked} | {name: [p for p in asked if group(p[0]) == name] for name in map(group, rows)}
            if asked:
                record = {"length": length, "arm": arm, "precision": precision, "base": base}
                record["changed"] = sum(row["recall"] != other["recall"] for row, other in asked)
                record["recall"] = {name: asdict(_recall_gap(each)) for name, each in groups.items() if each}
                records.append(record)
    return records


def print_summary(summary: dict[str, Any], file: Any = None) -> None:
    """The settings as tables, and what was left out of them."""
    console = Console(file=file or sys.stdout, width=120 if file or not sys.stdout.isatty() else None)
    for table, note in (
        (_dense_table(summary), DENSE_NOTE), (_arms_table(summary), ARMS_NOTE), (_recall_table(summary), RECALL_NOTE),
        (_prediction_table(summary), PREDICTION_NOTE),
    ):  # fmt: skip
        if table.row_count:
            console.print(table)
            console.print(f"{note}\n", highlight=False)
    for record in summary["precisions"]:
        console.print(_precision_line(record))
    for record in summary["settings"]:
        if record["block_size"] and record["mean_density"] == 1:
            console.print(
                f"{record['arm']}, {record['precision']}, read {record['length']:,} tokens densely, as it does short "
                "prompts: that it is like dense shows nothing. Take longer --lengths, or --block-size 16.",
                highlight=False,
            )
    left_out: dict[int, list[str]] = {}
    for length, task in summary["left_out"]:
        left_out.setdefault(length, []).append(task)
    for length, tasks in left_out.items():
        console.print(f"not counted, since dense fails them at {length:,} tokens: {', '.join(tasks)}")


def _dense_table(summary: dict[str, Any]) -> Table:
    table = Table(title="what dense finds", title_justify="left")
    table.add_column("task")
    lengths = sorted({record["length"] for record in summary["dense_recall"]})
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    known = {
        (record["length"], record["task"]): f"{_share(record)} of {record['n']}" for record in summary["dense_recall"]
    }
    for task in dict.fromkeys(record["task"] for record in summary["dense_recall"]):
        table.add_row(task, *(known.get((length, task), "") for length in lengths))
    return table


def _arms_table(summary: dict[str, Any]) -> Table:
    table = _table("arms", "tokens", "arm", "precision", "density", "seconds")
    for record in summary["settings"]:
        density, took = f"{record['mean_density']:.3f}", f"{record['prefill_seconds']:.2f}"
        table.add_row(f"{record['length']:,}", record["arm"], record["precision"], density, took)
    return table


def _recall_table(summary: dict[str, Any]) -> Table:
    table = _table("what each arm finds", "tokens", "asked", "arm", "precision", "recall", "against dense")
    names = {name for record in summary["settings"] for name in record["recall"]}
    for name in sorted(names, key=lambda name: (name != "retrieval", name != "lookup", name)):
        for record in summary["settings"]:
            found = record["recall"].get(name)
            if found is not None:
                gap = _points(found["to_dense"]) if "to_dense" in found else ""
                table.add_row(f"{record['length']:,}", name, record["arm"], record["precision"], _share(found), gap)
        table.add_section()
    return table


def _prediction_table(summary: dict[str, Any]) -> Table:
    table = _table("predictions against dense", "tokens", "where", "arm", "precision", "KL", "same first", "NLL")
    places = dict(zip((*TEXT_TASKS, "lookup", "retrieval"), ("inside", "behind", "lookup", "answer"), strict=True))
    for task, place in places.items():
        for record in summary["settings"]:
            found = record["predictions"].get(task)
            if found:
                along = task in TEXT_TASKS  # elsewhere these are of an answer, and not against dense
                cells = (_number(found.get("top1"), 3), _number(found.get("nll_to_dense"))) if along else ("", "")
                setting = f"{record['length']:,}", place, record["arm"], record["precision"]
                table.add_row(*setting, _number(found.get("kl")), *cells)
        table.add_section()
    return table


def _table(title: str, *headings: str) -> Table:
    """Lines are long, not wide: of a table that a terminal is too narrow for, columns would be cut."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        numbers = heading in ("tokens", "density", "seconds")
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading != "arm", overflow="fold")
    return table


def _share(found: dict[str, Any]) -> str:
    return f"{found['mean']:.3f} ({found['low']:.3f}..{found['high']:.3f})"


def _number(found: dict[str, Any] | None, digits: int = 4) -> str:
    if found is None:
        return ""
    told = f"{found['mean']:.{digits}f}"
    return told if found["low"] is None else f"{told} ({found['low']:.{digits}f}..{found['high']:.{digits}f})"


def _points(gap: dict[str, Any]) -> str:
    return f"{100 * gap['mean']:+.1f} ({100 * gap['low']:+.1f}..{100 * gap['high']:+.1f})"


def _precision_line(record: dict[str, Any]) -> str:
    gaps = "; ".join(f"{name} {_points(gap)}" for name, gap in record["recall"].items())
    gap = record["recall"]["all"]
    return (
        f"{record['precision']} - {record['base']}: {record['arm']}, {record['length']:,} tokens, points of recall: "
        f"{gaps}; "
        f"{record['changed']} of {gap['n']} questions in {gap['documents']} documents differ"
    )
