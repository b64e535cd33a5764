"""The charts of the page."""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.inspect.capture import Capture
from jobs.inspect.cells import LayerCells
from jobs.inspect.pictures import mostly_rule
from jobs.page import Chart
from jobs.page.charts import HEAT, MUTED, SERIES, graph_objects
from jobs.page.numbers import share, stretches
from stem_core.config import StemConfig

BY_SCORE, BY_RULE = SERIES[0], SERIES[1]
CURVE_POINTS = 600
# The scale of a map lies above it, so that there is room for the map on a phone.
_BAR = {
    "title": {"text": "chosen by so many of the heads", "side": "top"}, "tickformat": ".0%",
    "orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "len": 260, "lenmode": "pixels",
}  # fmt: skip


def map_chart(layer: int, cells: LayerCells, tokens: int) -> Chart:
    """The map of a layer, all heads together, that tells more under the pointer."""
    go, grid = graph_objects(), cells.grid
    shares, rule = cells.shares(), mostly_rule(grid)
    wide = grid.per_cell * grid.block_size
    place = {"x0": wide / 2, "dx": wide, "y0": wide / 2, "dy": wide}
    where = "queries around %{y:,d}<br>keys around %{x:,d}"
    figure = go.Figure(
        [
            go.Heatmap(
                z=rule.astype(np.uint8), zmin=0, zmax=1, showscale=False, hoverinfo="skip", **place,
                colorscale=[(0, "rgba(0,0,0,0)"), (1, BY_RULE)],
            ),
            go.Heatmap(
                z=np.where(rule, np.nan, shares).astype(np.float32), zmin=0, zmax=1, colorscale=HEAT, **place,
                colorbar=_BAR, hoverongaps=False,
                hovertemplate=f"{where}<br>chosen by %{{z:.0%}} of heads<extra></extra>",
            ),
        ]
    )  # fmt: skip
    figure.update_layout(margin={"l": 56, "r": 16, "t": 8, "b": 44})
    same = {"showgrid": False, "tickformat": "~s", "constrain": "domain", "automargin": False}
    figure.update_xaxes(range=[0, tokens], constraintoward="left", **same)
    figure.update_yaxes(range=[tokens, 0], scaleanchor="x", constraintoward="top", **same)
    # plotly 7.1 sets the titles of axes that are bound to each other on top of their labels, at some lengths.
    title = {"xref": "x domain", "yref": "y domain", "showarrow": False}
    figure.add_annotation(text="key token", x=0.5, y=0, yanchor="top", yshift=-22, **title)
    figure.add_annotation(text="query token", x=0, y=0.5, xanchor="right", xshift=-36, textangle=-90, **title)
    covered = int((grid.budgets > np.arange(grid.blocks)).argmin()) * grid.block_size  # tokens of the first rows
    if covered > tokens / 20:
        _label(figure, covered * 0.6, covered * 0.6, 30, -4, "budget covers everything")
    _label(figure, tokens / 2, tokens / 2, 40, -30, "nearest blocks")
    notes = ["Blue: chosen by score. Orange: kept by rule."]
    if not cells.pattern().empty:
        half, most = cells.reach_tokens(0.5), cells.reach_tokens(0.9)
        notes.append(f"Half of the chosen blocks lie within {half:,} tokens, nine tenths within {most:,}.")
    if not np.isnan(cells.shared):
        notes.append(f"Where one head chose a block, {share(cells.shared)} of the others did.")
    if grid.per_cell > 1:
        notes.append(f"A cell is {grid.per_cell} x {grid.per_cell} blocks; its colour is their mean.")
    return Chart(f"Layer {layer}: which blocks are kept", figure, " ".join(notes), height=620)


def _label(figure: Any, x: float, y: float, right: int, down: int, text: str) -> None:
    """A word in the empty half of a map, with a line to the place that it is about."""
    figure.add_annotation(
        x=x, y=y, ax=right, ay=down, text=text, xanchor="left", arrowhead=0, arrowwidth=1, standoff=3
    )  # fmt: skip


def budget_charts(seen: Capture) -> list[Chart]:
    """Blocks kept at each position of the prompt, and their share of the causal ones."""
    go, grid = graph_objects(), seen.grid
    cells = next(iter(seen.layers.values()))
    rows = np.linspace(0, grid.blocks - 1, min(grid.blocks, CURVE_POINTS)).astype(int)
    rows = np.unique(np.append(rows, _jumps(grid.budgets)))
    position, causal, kept = rows * grid.block_size, rows + 1, cells.kept[rows] / cells.heads
    forced = np.minimum(causal, grid.sink_blocks + grid.local_blocks)
    lines = (
        ("all before it: dense attention", causal, MUTED),
        ("kept", kept, BY_SCORE),
        ("sink and local blocks alone", forced, BY_RULE),
    )
    blocks = go.Figure([_line(go, position, values, name, colour) for name, values, colour in lines])
    shares = go.Figure([_line(go, position, kept / causal, "kept", BY_SCORE)])
    for figure in (blocks, shares):
        figure.update_xaxes(title="position in the prompt, tokens", tickformat=",d")
    blocks.update_yaxes(title="key blocks", rangemode="tozero", tickformat=",d")
    shares.update_yaxes(title="share", range=[0, 1.03], tickformat=".0%")
    note = "What lies between the grey line and the blue one is skipped. " + _budget_words(seen.stem)
    early = "The first query blocks read everything, since their budget covers all that lies before them."
    return [
        Chart("Key blocks that each query block keeps", blocks, note),
        Chart("The same as a share of what dense attention reads", shares, early, height=240),
    ]


def _jumps(budgets: np.ndarray) -> np.ndarray:
    """Where the curve jumps, so that thinning it out does not slant the jump."""
    jumps = np.flatnonzero(np.abs(np.diff(budgets)) > 1)
    return np.concatenate([jumps, jumps + 1])


def _budget_words(stem: StemConfig) -> str:
    words = "The budget is the same for all query blocks that have more before them than it covers."
    if stem.decay < 1:
        words = (
            "The budget falls towards the end: an error in an early row spreads to all later rows, one in a late row "
            "does not."
        )
    tail = f" The last {stem.dense_tail} query blocks read everything."
    return words + (tail if stem.dense_tail else "")


def _line(go: Any, x: np.ndarray, y: np.ndarray, name: str, colour: str) -> Any:
    return go.Scatter(x=x.tolist(), y=y.tolist(), mode="lines", name=name, line={"color": colour})


def density_chart(seen: Capture) -> Chart:
    """What each layer reads, by rule and by score."""
    go = graph_objects()
    parts: dict[str, list[float | None]] = {"kept by rule": [], "chosen by score": [], "dense or sliding window": []}
    for layer, density in enumerate(seen.densities):
        cells = seen.layers.get(layer)
        parts["kept by rule"].append(cells.by_rule if cells else None)
        parts["chosen by score"].append(cells.density - cells.by_rule if cells else None)
        parts["dense or sliding window"].append(None if cells else density)
    figure = go.Figure(
        [
            go.Bar(y=values, name=name, marker={"color": colour}, hovertemplate="layer %{x}: %{y:.1%}<extra></extra>")
            for (name, values), colour in zip(parts.items(), (BY_RULE, BY_SCORE, MUTED), strict=True)
            if any(value is not None for value in values)
        ]
    )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="layer", dtick=1 if len(seen.densities) <= 32 else 8)
    figure.update_yaxes(title="share of all causal blocks", range=[0, 1.03], tickformat=".0%")
    notes = [f"Together {share(seen.density)}, the density in the document's result row."]
    for reason in dict.fromkeys(seen.dense.values()):
        layers = [layer for layer, other in seen.dense.items() if other == reason]
        notes.append(f"Layer{'s' * (len(layers) > 1)} {', '.join(stretches(layers))}: {reason}.")
    return Chart("What each layer reads", figure, " ".join(notes), height=280)
