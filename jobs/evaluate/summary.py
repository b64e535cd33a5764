"""From rows to what is reported: recall by setting and task, paired with dense, as a table and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jobs.evaluate.results import BY_EXACTNESS, Estimate, Row, estimate, question_key, setting_key

# Pooled as "retrieval"; lookups and summaries are told apart, since they ask for more than the end of the prompt.
APART = ("lookup", "summary", "common_words", "frequent_words")
# A task that dense attention itself fails more often than this says nothing about a selection.
LEARNED = 0.5


def unlearned_tasks(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """(length, task) that the model does not do well enough when dense."""
    return {key for key, found in dense_recall(rows).items() if found.mean < LEARNED}


def baseline(rows: Sequence[Row]) -> list[Row]:
    """The rows of dense that all others are compared with: the evaluation's own, or the engine's most exact."""
    dense = [row for row in rows if not row["block_size"]]
    best = min((_inexactness(row["precision"]) for row in dense), default=0)
    return [row for row in dense if _inexactness(row["precision"]) == best]


def _inexactness(precision: str | None) -> int:
    return -1 if precision is None else BY_EXACTNESS.index(precision)


def dense_recall(rows: Sequence[Row]) -> dict[tuple[int, str], Estimate]:
    """Recall of the dense arm by (length, task); of the most exact precision, if the engine ran in several."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in baseline(rows):
        found.setdefault((row["length"], row["task"]), []).append(row)
    return {
        key: estimate([row["recall"] for row in each], [row["document"] for row in each]) for key, each in found.items()
    }


def group(row: Row) -> str:
    """Where a row is counted: "retrieval" or a task of its own."""
    return row["task"] if row["task"] in APART else "retrieval"


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain values for a JSON file: the dense recall of each task, and one record for each setting."""
    unlearned = unlearned_tasks(rows)
    dense = {question_key(row): row for row in baseline(rows)}
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(setting_key(row), []).append(row)
    return {
        "dense_recall": [
            {"length": length, "task": task, "recall": found.mean, **asdict(found)}
            for (length, task), found in sorted(dense_recall(rows).items())
        ],
        "left_out": sorted([list(key) for key in unlearned]),
        "settings": [_setting(settings[key], dense, unlearned) for key in sorted(settings, key=str)],
        "precisions": _precisions([row for row in rows if (row["length"], row["task"]) not in unlearned]),
    }


def _precisions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How recall in each setting of the engine differs from its most exact precision, question by question.

    All lengths together: documents of any length tell of the precision alike.
    """
    by_setting: dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], Row]]] = {}
    for row in rows:
        if row["precision"] is not None:
            arm = row["arm"].removesuffix(f" {row['precision']}")
            setting = (*setting_key(row | {"arm": arm})[1:], arm)
            by_setting.setdefault(setting, {}).setdefault(row["precision"], {})[question_key(row)] = row
    records = []
    for setting in sorted(by_setting, key=str):
        base, *others = sorted(by_setting[setting], key=BY_EXACTNESS.index)
        exact = by_setting[setting][base]
        for precision in others:
            pairs = [(row, exact[key]) for key, row in by_setting[setting][precision].items() if key in exact]
            if pairs:
                records.append({"arm": setting[-1], "precision": precision, "base": base, **_difference(pairs)})
    return records


def _difference(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Rows of one setting and the base precision's rows on the same questions."""
    record: dict[str, Any] = {name: pairs[0][0][name] for name in ("block_size", "dense_tail")}
    record["lengths"] = sorted({row["length"] for row, _ in pairs})
    record["density"] = _mean([row for row, _ in pairs], "density")
    record["changed"] = sum(row["recall"] != other["recall"] for row, other in pairs)
    groups = {"all": pairs} | {
        name: [pair for pair in pairs if group(pair[0]) == name] for name in {group(row) for row, _ in pairs}
    }
    record["recall"] = {
        name: asdict(
            estimate([row["recall"] - other["recall"] for row, other in found], [row["document"] for row, _ in found])
        )
        for name, found in sorted(groups.items())
    }
    return record


def _setting(rows: Sequence[Row], dense: dict[tuple[Any, ...], Row], unlearned: set[tuple[int, str]]) -> dict[str, Any]:
    first = rows[0]
    counted = [row for row in rows if (row["length"], row["task"]) not in unlearned]
    about = ("length", "arm", "block_size", "target_density", "dense_tail", "config")
    record: dict[str, Any] = {name: first[name] for name in about}
    record["blocks"] = max(row["blocks"] for row in rows)
    record |= {name: _mean(rows, name) for name in ("density", "mean_density", "first_token_kl", "answer_kl")}
    record |= {name: _by_layer(rows, name) for name in ("retained_mass", "document_mass", "needle_kept")}
    once = {row["document"]: row["prefill_seconds"] for row in rows}
    record["prefill_seconds"] = float(np.median(list(once.values())))
    record["recall"] = {
        name: _paired([row for row in counted if group(row) == name], dense) for name in sorted({*map(group, counted)})
    }
    record["tasks"] = {
        name: _paired([row for row in rows if row["task"] == name], dense)
        for name in sorted({row["task"] for row in rows})
    }
    record["exact"] = {
        name: float(np.mean([row["exact"] for row in rows if row["task"] == name and row["exact"] is not None]))
        for name in sorted({row["task"] for row in rows if row["exact"] is not None})
    }
    return record


def _paired(rows: Sequence[Row], dense: dict[tuple[Any, ...], Row]) -> dict[str, Any]:
    """Recall, and its difference to dense on the same questions where dense ran."""
    found = estimate([row["recall"] for row in rows], [row["document"] for row in rows])
    pairs = [(row, dense[question_key(row)]) for row in rows if question_key(row) in dense]
    record: dict[str, Any] = asdict(found)
    if pairs and any(row is not other for row, other in pairs):
        gaps = [row["recall"] - other["recall"] for row, other in pairs]
        record["to_dense"] = asdict(estimate(gaps, [row["document"] for row, _ in pairs]))
    return record


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None


def _by_layer(rows: Sequence[Row], name: str) -> list[float] | None:
    values = [row[name] for row in rows if row[name] is not None]
    return np.mean(values, axis=0).tolist() if values else None


def print_summary(summary: dict[str, Any], file: Any = None) -> None:
    """The settings as a table, and what was left out of it."""
    console = Console(file=file or sys.stdout, width=190 if file or not sys.stdout.isatty() else None)
    dense = Table(title="dense recall by task, with its 95% interval and number of questions", title_justify="left")
    lengths = sorted({record["length"] for record in summary["dense_recall"]})
    dense.add_column("task")
    for length in lengths:
        dense.add_column(f"{length:,}", justify="right")
    known = {(record["length"], record["task"]): _dense(record) for record in summary["dense_recall"]}
    for task in dict.fromkeys(record["task"] for record in summary["dense_recall"]):
        dense.add_row(task, *(known.get((length, task), "") for length in lengths))
    if known:
        console.print(dense)
    names = sorted({name for record in summary["settings"] for name in record["recall"]}, key=_column)
    table = Table(
        title="recall; of dense its 95% interval, of the others the difference to dense in points with its interval",
        title_justify="left",
    )
    for heading in ("tokens", "B", "arm", "tail", "density"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading != "arm")
    for name in names:
        table.add_column(name, no_wrap=True)
    for heading in ("KL 1st", "KL answer", "mass", "needle", "s/doc"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in summary["settings"]:
        table.add_row(
            f"{record['length']:,}",
            str(record["block_size"] or ""),
            record["arm"],
            str(record["dense_tail"] or ""),
            f"{record['density']:.3f}",
            *(_recall(record["recall"].get(name)) for name in names),
            *(_number(record[name]) for name in ("first_token_kl", "answer_kl")),
            *(_number(_overall(record[name])) for name in ("retained_mass", "needle_kept")),
            f"{record['prefill_seconds']:.2f}",
        )
    console.print(table)
    for record in summary["precisions"]:
        console.print(_precision_line(record))
    left_out: dict[int, list[str]] = {}
    for length, task in summary["left_out"]:
        left_out.setdefault(length, []).append(task)
    for length, tasks in left_out.items():
        console.print(f"not counted, since dense fails them at {length:,} tokens: {', '.join(tasks)}")


def _dense(record: dict[str, Any]) -> str:
    return f"{record['mean']:.3f} ({record['low']:.3f}..{record['high']:.3f}) of {record['n']}"


def _column(name: str) -> tuple[bool, str]:
    return name != "retrieval", name


def _overall(layers: list[float] | None) -> float | None:
    return float(np.mean(layers)) if layers else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _recall(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    gap = found.get("to_dense")
    if gap is None:
        return f"{found['mean']:.3f} ({found['low']:.2f}..{found['high']:.2f})"
    return f"{found['mean']:.3f} {100 * gap['mean']:+.1f} ({100 * gap['low']:+.0f}..{100 * gap['high']:+.0f})"


def _precision_line(record: dict[str, Any]) -> str:
    gap, shortest, longest = record["recall"]["all"], record["lengths"][0], record["lengths"][-1]
    setting = f"{record['arm']} B={record['block_size']} tail={record['dense_tail']}"
    lengths = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return (
        f"{record['precision']} - {record['base']}: {setting if record['block_size'] else record['arm']}, "
        f"density {record['density']:.3f}, {lengths} tokens: {100 * gap['mean']:+.1f} points of recall "
        f"({100 * gap['low']:+.1f}..{100 * gap['high']:+.1f}); "
        f"{record['changed']} of {gap['n']} questions in {gap['documents']} documents differ"
    )
