"""The charts of a report: a trace for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.page import Chart, numbers
from jobs.page.charts import GRID, SERIES, graph_objects, seconds_axis
from jobs.report import clock
from jobs.report.measures import Measures, worked
from jobs.report.results import Run
from pipeline.results.rows import PHASES

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_POINTS = 1500  # of a run in a chart; a phone draws them without delay
PHASE_NAMES = {
    "queue": "waiting", "load": "reading", "tokenize": "tokenising", "prefill": "prefill", "decode": "decode",
    "other": "other documents' steps",
}  # fmt: skip
PHASE_COLOURS = {
    "queue": SERIES[7], "load": SERIES[1], "tokenize": SERIES[2], "prefill": SERIES[0], "decode": SERIES[3],
    "other": GRID,
}  # fmt: skip


def length_label(low: int, high: int) -> str:
    """A range of prompt lengths in tokens, K for 1,024."""
    return f"{_tokens(low)} to {_tokens(high)}"


def _tokens(value: int) -> str:
    return f"{value // 1024}K" if value >= 1024 and value % 1024 == 0 else f"{value:,}"


def latency_chart(runs: Sequence[Run], measures: Sequence[Measures]) -> Chart | None:
    """Time to first token of each document by its prompt's length, and p50 and p95 over ranges of length."""
    shown = [_drawn(run, "time_to_first_token") for run in runs]
    if not any(len(rows) for rows in shown):
        return None
    figure = graph_objects().Figure()
    for number, (run, found, rows) in enumerate(zip(runs, measures, shown, strict=True)):
        seconds = run.numbers("time_to_first_token")
        _scatter(figure, run, rows, seconds, number, [numbers.seconds(value) for value in seconds[rows]])
        for name, dash in (("p50", "solid"), ("p95", "dot")):
            _line_by_length(figure, run, found, name, dash, number, several=len(runs) > 1)
    _length_axis(figure, runs, shown)
    values = np.concatenate([run.numbers("time_to_first_token")[rows] for run, rows in zip(runs, shown, strict=True)])
    seconds_axis(figure, values, "time to first token")
    one, many = ("an answer", "answers") if any(run.questions > 1 for run in runs) else ("a document", "documents")
    note = f"A point is {one}. In each range of lengths half of the {many} are below the line p50, 95% below p95."
    return Chart("Time to first token by prompt length", figure, note + _sampled(runs, shown), 360)


def density_chart(runs: Sequence[Run]) -> Chart | None:
    """Density of each document by its prompt's length; None if nothing ran sparse."""
    if not any((np.array(run.texts("attention"), dtype=object)[run.ok] == "stem").any() for run in runs):
        return None
    note = "Share of the causal key blocks that prefill computed, over layers and heads; 1 is dense."
    axis = {"title_text": "density", "range": [0, 1.05]}
    return _points_chart(runs, "density", "density {:.3f}", axis, "Density by prompt length", note)


def memory_chart(runs: Sequence[Run]) -> Chart | None:
    """Peak GPU memory of each document by its prompt's length; None if nothing ran on a GPU."""
    note = "Most that was allocated while the document was in the engine, whoever else was there; with the KV arena."
    axis = {"title_text": "GiB", "rangemode": "tozero"}
    return _points_chart(runs, "peak_gpu_bytes", "{:.1f} GiB", axis, "GPU memory by prompt length", note, unit=2**30)


def _points_chart(
    runs: Sequence[Run], column: str, told: str, axis: dict[str, Any], title: str, note: str, unit: int = 1
) -> Chart | None:
    """A column by the prompt's length, a point for each document; None if there are none.

    told: format of a value under the pointer. axis: of the values. unit: what they are divided by.
    """
    shown = [_drawn(run, column) for run in runs]
    if not any(len(rows) for rows in shown):
        return None
    figure = graph_objects().Figure()
    for number, (run, rows) in enumerate(zip(runs, shown, strict=True)):
        values = run.numbers(column) / unit
        _scatter(figure, run, rows, values, number, [told.format(value) for value in values[rows]])
    _length_axis(figure, runs, shown)
    figure.update_yaxes(**axis)
    figure.update_layout(showlegend=len(runs) > 1)
    return Chart(title, figure, note + _sampled(runs, shown), 280)


def phases_chart(bars: Sequence[tuple[str, dict[str, float] | None, int]], *, answers: bool = False) -> Chart:
    """Mean seconds of a document by phase. bars: (label, seconds of its documents by phase, how many those are).

    answers: what is counted are answers, of which documents have several.
    """
    one, many = ("an answer", "answers") if answers else ("a document", "documents")
    figure = graph_objects().Figure()
    labels = [label for label, _, _ in bars]
    for phase in (*PHASES, "other"):
        means = [(phases or {}).get(phase, 0.0) / max(documents, 1) for _, phases, documents in bars]
        if max(means) > 0:
            told = [numbers.seconds(value) for value in means]
            figure.add_bar(
                x=means, y=labels, orientation="h", name=PHASE_NAMES[phase], marker_color=PHASE_COLOURS[phase],
                customdata=told, hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_xaxes(title_text=f"mean seconds {one}", rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    note = (
        f"From a worker's taking a document to its result, over the {many} that are ok. Those that a worker holds "
        "take turns: a decode step counts for all that it serves; the rest of the time is other documents' steps."
    )
    return Chart(f"Where {one}'s time goes", figure, note, 120 + 34 * len(labels))


def throughput_chart(runs: Sequence[Run]) -> Chart | None:
    """Tokens a second over the time worked."""
    figure, go = None, graph_objects()
    marks: list[float] = []
    for number, run in enumerate(runs):
        rows, starts, ends = worked(run)
        found = clock.sessions(starts, ends)
        tokens = np.nan_to_num(run.read_tokens[rows]) + np.nan_to_num(run.numbers("output_tokens")[rows])
        times, rates = clock.rate_over_time(clock.elapsed(found, starts), clock.elapsed(found, ends), tokens)
        if not len(times) or not tokens.any():
            continue
        figure = figure or go.Figure()
        told = [
            f"{numbers.figure(rate, 'tokens/s')} at {numbers.seconds(at)}"
            for at, rate in zip(times, rates, strict=True)
        ]
        figure.add_scatter(
            x=times, y=rates, mode="lines", line={"color": SERIES[number % len(SERIES)], "width": 2, "shape": "hvh"},
            name=run.name, customdata=told, hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
        marks += [session.before for session in found[1:]] if len(runs) == 1 else []
    if figure is None:
        return None
    for mark in marks:
        figure.add_vline(x=mark, line={"color": GRID, "width": 2, "dash": "dot"})
    _time_axis(figure)
    figure.update_yaxes(title_text="tokens/s", rangemode="tozero", tickformat="~s")
    figure.update_layout(showlegend=len(runs) > 1)
    note = "Tokens of prompts and outputs, each document's spread evenly over its time in a worker."
    paused = " Pauses between runs are left out" + ("; a dotted line is where the job went on." if marks else ".")
    return Chart("Throughput over the time worked", figure, note + paused, 280)


def _scatter(
    figure: go.Figure, run: Run, rows: np.ndarray, values: np.ndarray, number: int, told: Sequence[str]
) -> None:
    tokens = run.numbers("prompt_tokens")[rows]
    names = [(run.rows["document_id"][int(row)].as_py() or "")[:60] for row in rows]
    if run.questions > 1:
        asked = run.texts("question_id")
        names = [f"{name}, {asked[row][:40]}" for name, row in zip(names, rows, strict=True)]
    about = [f"{name}: {count:,.0f} tokens, {text}" for name, count, text in zip(names, tokens, told, strict=True)]
    figure.add_scatter(
        x=tokens, y=values[rows], mode="markers", name=run.name, customdata=about, showlegend=bool(run.name),
        marker={"color": SERIES[number % len(SERIES)], "size": 6, "opacity": 0.45},
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _line_by_length(
    figure: go.Figure, run: Run, found: Measures, name: str, dash: str, number: int, *, several: bool
) -> None:
    ranges = [item for item in found["by_length"] if item["time_to_first_token"]]
    middles = [item["median_tokens"] for item in ranges]
    figure.add_scatter(
        x=middles, y=[item["time_to_first_token"][name] for item in ranges], mode="lines+markers",
        line={"color": SERIES[number % len(SERIES)], "width": 2, "dash": dash}, marker_size=4,
        name=f"{run.name} {name}" if several else name, hoverinfo="skip",
    )  # fmt: skip


def _drawn(run: Run, name: str) -> np.ndarray:
    """Numbers of the rows to draw: all, or a sample that holds the largest values."""
    values, tokens = run.numbers(name), run.numbers("prompt_tokens")
    rows = np.flatnonzero(run.ok & (values > 0) & (tokens > 0))
    if len(rows) <= MOST_POINTS:
        return rows
    largest = rows[np.argsort(-values[rows], kind="stable")[:50]]
    spaced = rows[np.linspace(0, len(rows) - 1, MOST_POINTS - len(largest)).astype(int)]
    return np.unique(np.concatenate([largest, spaced]))


def _sampled(runs: Sequence[Run], shown: Sequence[np.ndarray]) -> str:
    left_out = any(
        run.ok.sum() > MOST_POINTS and len(rows) < run.ok.sum() for run, rows in zip(runs, shown, strict=True)
    )
    return f" Of more than {MOST_POINTS:,} documents a sample is drawn, the highest with it." if left_out else ""


def _length_axis(figure: go.Figure, runs: Sequence[Run], shown: Sequence[np.ndarray]) -> None:
    tokens = np.concatenate([run.numbers("prompt_tokens")[rows] for run, rows in zip(runs, shown, strict=True)])
    low, high = float(tokens.min()), float(tokens.max())
    figure.update_xaxes(title_text="prompt tokens (K: 1,024)")
    if high > 8 * low:
        ticks = [2**power for power in range(int(np.log2(low)), int(np.log2(high)) + 2)]
        span = [float(np.log10(low * 0.9)), float(np.log10(high * 1.1))]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[_tokens(tick) for tick in ticks], range=span)
    else:
        step = 2 ** max(0, round(np.log2(max(high - low, 8.0) / 5)))
        ticks = [step * number for number in range(int(low // step), int(high // step) + 2)]
        figure.update_xaxes(tickvals=ticks, ticktext=[_tokens(tick) for tick in ticks])


def _time_axis(figure: go.Figure) -> None:
    """Seconds on the x axis in the unit that fits."""
    last = max(float(np.max(trace.x)) for trace in figure.data)
    size, unit = next(((s, u) for s, u in ((3600, "hours"), (60, "minutes")) if last >= 3 * s), (1, "seconds"))
    for trace in figure.data:
        trace.x = np.asarray(trace.x) / size
    for shape in figure.layout.shapes:
        shape.x0, shape.x1 = shape.x0 / size, shape.x1 / size
    figure.update_xaxes(title_text=f"{unit} worked", rangemode="tozero")
