"""What a report begins with: the state of each run and its key figures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from jobs.page import Block, KeyFigure, KeyFigures, Prose, Table
from jobs.page.numbers import binary_bytes, count, figure, seconds
from jobs.report.measures import Measures
from pipeline.results.columns import utc_now

STATES = {
    "finished": "finished",
    "stopped": "stopped before its end; the same command goes on from there",
    "running": "running, or ended without a word; if it does not run, the same command goes on from there",
    "unknown": "in a state that is not known",
    "empty": "no job has written anything yet",
}


def subtitle(measures: Sequence[Measures]) -> str:
    """What the report is about, in a line."""
    if len(measures) > 1:
        return f"{len(measures)} runs side by side: {', '.join(run['name'] for run in measures)}"
    run = measures[0]
    times = _times(run)
    model = (run["config"] or {}).get("model")
    parts = [run["output"], f"model {model}" if model else "", f"{times} UTC" if times else ""]
    return " · ".join(part for part in (*parts, "finished" if run["state"] == "finished" else "") if part)


def _times(run: Measures) -> str:
    """From when to when its rows are, the day once if it is the same."""
    begin, end = ((run[name] or "").removesuffix("+00:00").split("T") for name in ("started_at", "finished_at"))
    if len(begin) < 2:
        return ""
    return f"{' '.join(begin)} to {' '.join(end) if begin[0] != end[0] else end[1]}"


def key_figures(run: Measures) -> list[KeyFigure]:
    """The figures of a run that its report begins with."""
    of = "" if run["documents"] is None else f"of {run['documents']:,} documents"
    many = run["questions"] > 1
    if many:
        of = f"of {run['rows']:,} answers about {run['documents_with_row']:,} documents"
    first, kept = run["time_to_first_token"] or {}, run["density"]
    failed = ", ".join(f"{number:,} {status}" for status, number in run["counts"].items() if status != "ok")
    figures = [
        KeyFigure("ok", count(run["ok"]), of, "good" if run["ok"] else ""),
        KeyFigure("failed", count(run["failed"]), failed, "bad" if run["failed"] else ""),
        KeyFigure("answers not there yet" if many else "without a row yet", count(run["without_row"]))
        if run["without_row"] else None,
        KeyFigure("time worked", seconds(run["worked_seconds"]), _worked_note(run)),
        KeyFigure(
            "documents per hour", figure(run["documents_per_hour"]),
            f"{figure(run['answers_per_hour'])} answers" if many else "",
        ),
        KeyFigure("throughput", figure(run["tokens_per_second"], "tokens/s"), "prompts and outputs, all workers"),
        KeyFigure("time to first token, p50", seconds(first.get("p50"))),
        KeyFigure("time to first token, p95", seconds(first.get("p95"))),
        KeyFigure("prompt tokens", count(run["prompt_tokens"]), _prompt_note(run)),
        KeyFigure("generated tokens", count(run["output_tokens"]), _rate(run["decode_tokens_per_second"], "decode")),
        KeyFigure("density", figure(kept["mean"] or (1.0 if run["ok"] else None)), _density_note(run)),
        KeyFigure("GPU memory, peak", binary_bytes(run["peak_gpu_bytes"])) if run["peak_gpu_bytes"] else None,
        KeyFigure("tried more than once", count(run["tried_again"], "documents")) if run["tried_again"] else None,
        KeyFigure("cut in the middle", count(run["truncated"], "documents")) if run["truncated"] else None,
        KeyFigure("outputs cut off", count(run["cut_off"]), "at --max-new-tokens", "bad") if run["cut_off"] else None,
        KeyFigure("done in parts", count(run["in_parts"], "documents")) if run["in_parts"] else None,
    ]  # fmt: skip
    return [item for item in figures if item is not None]


def _worked_note(run: Measures) -> str:
    workers = f"{run['workers']} worker{'s' * (run['workers'] != 1)}" if run["workers"] else ""
    stretches = f"in {run['runs']} stretches" if run["runs"] > 1 else ""
    return ", ".join(part for part in (stretches, workers) if part)


def _rate(rate: float | None, phase: str) -> str:
    return f"{phase} {figure(rate, 'tokens/s')} in a document" if rate else ""


def _prompt_note(run: Measures) -> str:
    read = f"{run['read_tokens']:,} read" if run["read_tokens"] < run["prompt_tokens"] else ""
    return ", ".join(part for part in (read, _rate(run["prefill_tokens_per_second"], "prefill")) if part)


def _density_note(run: Measures) -> str:
    kept = run["density"]
    if not kept["sparse_documents"]:
        return "all ran dense" if run["ok"] else ""
    return f"mean of {kept['sparse_documents']:,} with Stem" + (
        f"; {kept['dense_documents']:,} ran dense" if kept["dense_documents"] else ""
    )


def states_of(measures: Sequence[Measures]) -> list[Block]:
    """The state of each run in words."""
    return [Prose(_state(run, len(measures) > 1)) for run in measures]


def overview(measures: Sequence[Measures]) -> list[Block]:
    """The key figures of a run; of several runs in columns."""
    if len(measures) == 1:
        return [KeyFigures(key_figures(measures[0]))] if measures[0]["rows"] else []
    columns = [_in_column(run) for run in measures]
    found = list(dict.fromkeys(label for column in columns for label in column))
    labels = sorted(found, key=lambda label: found.index(label.partition(":")[0]))  # statuses that one run lacks
    rows = [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    return [Table(("", *(run["name"] for run in measures)), rows)]


def _in_column(run: Measures) -> dict[str, str]:
    """The key figures by their labels; what else a run's page has as a note is a figure of its own."""
    more = {
        "failed": {f"failed: {status}": count(number) for status, number in run["counts"].items() if status != "ok"},
        "prompt tokens": {"prefill, tokens/s in a document": count(run["prefill_tokens_per_second"])},
        "generated tokens": {"decode, tokens/s in a document": figure(run["decode_tokens_per_second"])},
        "density": {"documents with Stem": count(run["density"]["sparse_documents"])},
    }
    column: dict[str, str] = {}
    for item in key_figures(run):
        column |= {item.label: item.value, **more.get(item.label, {})}
    return column


def _state(run: Measures, several: bool) -> str:
    words = [f"{run['name']}: " if several else "", f"The job is {STATES.get(run['state'], run['state'])}."]
    if run["state"] == "empty":
        words[1] = "No job has written here yet."
    elif run["problem"]:
        words[1] = f"The job's {run['problem']}: settings, versions and the number of documents are not known."
    elif run["state"] == "unknown":
        words[1] = "There is no manifest.json: settings, versions and the number of documents are not known."
    if run["state"] == "finished" and run["without_row"]:
        what = "answers are not there" if run["questions"] > 1 else "documents have no row"
        words.append(f" {run['without_row']:,} {what} all the same: parts are missing; run it again.")
    if run["state"] == "running" and run["finished_at"]:
        age = (utc_now() - datetime.fromisoformat(run["finished_at"])).total_seconds()
        words.append(f" Its last row is {seconds(max(age, 0))} old.")
    if run["state"] != "empty" and not run["rows"]:
        words.append(" No document has a row yet.")
    return "".join(words)
