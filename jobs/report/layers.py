"""Density of each layer by prompt length: of dense leading layers, of those with a sliding window, of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jobs.page import Chart, Table
from jobs.page.charts import graph_objects
from jobs.page.numbers import figure, stretches
from jobs.report.measures import Measures

LABELLED = 40  # layers of a chart whose cells hold their figures
NAMED = 4  # stretches of layers that a row names
Label = Callable[[int, int], str]


TITLE = "Density by layer and prompt length"


def layer_table(measures: Sequence[Measures], label: Label, title: str) -> Table | None:
    """A row for all layers that are alike, a column for each range of lengths; None if nothing is known.

    label: a range of lengths as text.
    """
    lengths = [
        (low, high)
        for low, high in ((item["from_tokens"], item["to_tokens"]) for item in measures[0]["by_length"])
        if any(_layers(run, low) for run in measures)
    ]
    if not lengths:
        return None
    several = len(measures) > 1
    rows = []
    for run in measures:
        columns = [_layers(run, low) for low, _ in lengths]
        found = np.array([column or [np.nan] * _count(run) for column in columns], dtype=np.float64)
        for layers in _alike(found):
            cells = [figure(value) for value in found[:, layers[0]]]
            rows.append([*([run["name"]] if several else []), _names(layers), *cells])
    note = "Means of the documents that ran sparse. A dense layer is 1.00."
    header = [*(["run"] if several else []), "layers", *(label(low, high) for low, high in lengths)]
    return Table(header, rows, title, note)


def layer_chart(run: Measures, label: Label, *, several: bool) -> Chart | None:
    """A heat map, the first layer at the top; None if nothing is known."""
    ranges = [item for item in run["by_length"] if item["density_by_layer"]]
    if not ranges:
        return None
    values = np.array([item["density_by_layer"] for item in ranges]).T
    layers, go = len(values), graph_objects()
    heat = go.Heatmap(
        z=values.astype(np.float32), x=[label(item["from_tokens"], item["to_tokens"]) for item in ranges],
        zmin=0, zmax=1, xgap=2, ygap=1 if layers <= LABELLED else 0, showscale=layers > LABELLED,
        hovertemplate="layer %{y}, %{x} tokens: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    if layers <= LABELLED:
        heat.update(texttemplate="%{z:.2f}", textfont={"size": 11})
    drawn = go.Figure(heat)
    drawn.update_xaxes(title_text="prompt tokens", type="category", showgrid=False)
    drawn.update_yaxes(title_text="layer", autorange="reversed", showgrid=False, dtick=1 if layers <= 16 else 4)
    title = TITLE + (f": {run['name']}" if several else "")
    note = "Share of the causal key blocks that a layer computed; 1 is dense. Mean of the documents that ran sparse."
    return Chart(title, drawn, note, 90 + max(150, min(560, 17 * layers)))


def _layers(run: Measures, low: int) -> list[float] | None:
    return next((item["density_by_layer"] for item in run["by_length"] if item["from_tokens"] == low), None)


def _count(run: Measures) -> int:
    return max((len(item["density_by_layer"] or ()) for item in run["by_length"]), default=0)


def _alike(values: np.ndarray) -> list[list[int]]:
    """Layers, the columns of `values`, in groups that have the same densities."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for layer, column in enumerate(np.nan_to_num(values.T, nan=-1.0).round(4).tolist()):
        groups.setdefault(tuple(column), []).append(layer)
    return list(groups.values())


def _names(layers: Sequence[int]) -> str:
    names = stretches(layers)
    return ", ".join(names if len(names) <= NAMED else [*names[: NAMED - 1], f"... ({len(layers)} layers)"])
