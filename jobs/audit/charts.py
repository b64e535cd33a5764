"""The charts of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.audit.results import AuditRow
from jobs.page import Block, Chart
from jobs.page.charts import MUTED, SERIES, graph_objects, seconds_axis

HOVER = "%{fullData.name}: %{x:,} tokens, %{y:.3g}<extra></extra>"
# Neighbouring ticks of the axis of prompt lengths are at least this factor apart, where lengths differ by more.
TICK_FACTOR = 1.3
FEW_TICKS = 4


def first_token_chart(arms: Sequence[dict[str, Any]]) -> list[Block]:
    """Seconds to the first token by prompt length, one line an arm."""
    chart = graph_objects().Figure()
    for arm, colour in zip(arms, _colours(arms), strict=True):
        points = arm["curve"]
        _line(chart, arm["arm"], colour, [(point["prompt_tokens"], point["seconds"]) for point in points])
    _tokens(chart, "time to first token")
    seconds_axis(chart, [point["seconds"] for arm in arms for point in arm["curve"]], "time to first token")
    note = "Each document, and the beginning of the longest one cut to other lengths. Both axes are logarithmic."
    return [Chart("Time to first token", chart, note)]


def speedup_chart(arms: Sequence[dict[str, Any]]) -> list[Block]:
    """How many times faster than dense in the same precision each sparse arm's prefill is; none without such arms."""
    chart = graph_objects().Figure()
    for arm, colour in zip(arms, _colours(arms), strict=True):
        same = (other for other in arms if other["preset"] == "dense" and other["precision"] == arm["precision"])
        dense: dict[str, Any] = next(same, {"curve": []})
        by_length = {point["prompt_tokens"]: point["seconds"] for point in dense["curve"]}
        points = [p for p in arm["curve"] if p["sparse"] and p["prompt_tokens"] in by_length]
        if arm is not dense and points:
            ratios = [(p["prompt_tokens"], by_length[p["prompt_tokens"]] / p["seconds"]) for p in points]
            _line(chart, arm["arm"], colour, ratios)
    if not chart.data:
        return []
    chart.add_hline(y=1, line_color=MUTED, line_dash="dot")
    _tokens(chart, "times as fast")
    chart.update_yaxes(rangemode="tozero")
    return [Chart("Prefill against dense in the same precision", chart, "Above the dotted line sparse is faster.")]


def agreement_chart(rows: Sequence[AuditRow], arms: Sequence[dict[str, Any]]) -> list[Block]:
    """Share of tokens that agree with dense, document by document, over the prompt's length."""
    chart = graph_objects().Figure()
    for arm, colour in zip(arms, _colours(arms), strict=True):
        found = [(row, row.likeness) for row in rows if row.arm == arm["arm"] and row.likeness is not None]
        if found:
            chart.add_scatter(
                x=[row.from_engine.prompt_tokens for row, _ in found],
                y=[likeness.token_agreement for _, likeness in found],
                mode="markers",
                name=arm["arm"],
                marker_color=colour,
                customdata=[row.document_id for row, _ in found],
                hovertemplate="%{customdata}: %{y:.3f}<extra></extra>",
            )
    if not chart.data:
        return []
    _tokens(chart, "share of tokens")
    chart.update_yaxes(range=[-0.03, 1.03])
    return [Chart("Tokens that agree with dense, by document", chart)]


def _colours(arms: Sequence[Any]) -> list[str]:
    """An arm has the same colour in all charts."""
    return [SERIES[place % len(SERIES)] for place in range(len(arms))]


def _line(chart: Any, name: str, colour: str, points: Sequence[tuple[int, float]]) -> None:
    x, y = zip(*points, strict=True) if points else ((), ())
    chart.add_scatter(
        x=x, y=y, mode="lines+markers", name=name, line_color=colour, showlegend=True, hovertemplate=HOVER
    )


def _tokens(chart: Any, unit: str) -> None:
    """A logarithmic axis of prompt lengths, with ticks at lengths that were measured."""
    ticks: list[int] = []
    lengths = sorted({length for trace in chart.data for length in trace.x}, reverse=True)
    factor = min(TICK_FACTOR, (lengths[0] / lengths[-1]) ** (1 / FEW_TICKS))
    for length in lengths:
        if not ticks or ticks[-1] >= factor * length:
            ticks.append(length)
    chart.update_xaxes(type="log", title="prompt tokens", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    chart.update_yaxes(title=unit)
