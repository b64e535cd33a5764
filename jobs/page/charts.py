"""How charts look, and how a plotly figure becomes data of a page."""

from __future__ import annotations

import json
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from pipeline.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Collection

    import plotly.graph_objects as go

# Names of style.css, so that a chart follows light and dark. Neighbours differ for colour-blind readers too.
SERIES = tuple(f"var(--series-{number})" for number in range(1, 9))
MUTED, GRID, TEXT, BAD = "var(--muted)", "var(--line)", "var(--text)", "var(--bad)"
HEAT = ((0.0, "var(--heat-0)"), (0.5, "var(--heat-1)"), (1.0, "var(--heat-2)"))  # colorscale of a heat map

# Plotly reads markup in every text; these alone may hold some.
_MARKUP = ("hovertemplate", "texttemplate")


def graph_objects() -> Any:
    """plotly.graph_objects. Raises JobError where plotly is not installed."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise JobError("charts need plotly, which is not installed: pip install plotly") from None
    return go


def layout_template() -> go.layout.Template:
    """The look of all charts: no frame, faint lines, and no legend, which the page sets above the chart."""
    axis: dict[str, Any] = {
        "gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "tickcolor": "rgba(0,0,0,0)", "zeroline": False,
        "automargin": True, "title": {"standoff": 8, "font": {"size": 13}}, "ticks": "outside", "ticklen": 5,
    }  # fmt: skip
    label = {"bgcolor": "var(--surface)", "bordercolor": GRID, "font": {"color": TEXT}, "align": "left"}
    go = graph_objects()
    template = go.layout.Template(
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(SERIES),
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": MUTED},
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "hovermode": "closest",
            "hoverlabel": label | {"namelength": -1},
            "xaxis": axis,
            "yaxis": axis,
            "bargap": 0.35,
            "separators": ".,",
            "annotationdefaults": {"arrowcolor": MUTED},
        }
    )
    colorbar = {"outlinewidth": 0, "thickness": 12, "tickcolor": GRID}
    template.data.heatmap = [go.Heatmap(colorscale=HEAT, colorbar=colorbar)]
    return template


def seconds_axis(figure: go.Figure, values: Collection[float], title: str) -> None:
    """A logarithmic y axis over `values`, seconds, with at most eight round ticks in s and ms."""
    above = [float(value) for value in values if value > 0] or [1.0]
    low, high = min(above) * 0.8, max(above) * 1.25
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 8:
            break
    labels = [f"{tick:g} s" if tick >= 1 else f"{tick * 1000:g} ms" for tick in ticks]
    span = [log10(low), log10(high)]
    figure.update_yaxes(title_text=title, type="log", range=span, tickvals=ticks, ticktext=labels)


def chart_data(figure: go.Figure, height: int) -> str:
    """A figure as JSON that may stand inside a <script> element, its texts free of markup."""
    copy = graph_objects().Figure(figure)
    copy.update_layout(template=layout_template(), height=height, title=None)
    data = json.dumps(_plain(json.loads(copy.to_json())), separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


def _plain(value: Any, key: str = "") -> Any:
    """`value` with its texts as plotly must be given them to show them as they are."""
    if isinstance(value, dict):
        return {name: _plain(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, key) for item in value]
    if isinstance(value, str) and key not in _MARKUP:
        return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return value
