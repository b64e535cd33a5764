"""Recall by depth and length, recall against density, and what an arm loses against its time, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.evaluate.summary import TEXT_TASKS, group, unlearned_tasks
from jobs.known.results import Row
from pipeline.errors import JobError

DEPTHS = 10
INSTALL = "pip install -e '.[bench]'"


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises JobError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise JobError(f"plots need matplotlib: {INSTALL}, or leave out --plots") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """All plots of an evaluation; the files written."""
    pyplot = load_pyplot()
    left_out = unlearned_tasks(rows)
    asked = [row for row in rows if row["recall"] is not None]
    counted = [row for row in asked if (row["length"], row["task"]) not in left_out]
    paths: list[Path | None] = [_against_time(pyplot, rows, counted, folder)]
    if counted:
        paths.append(_against_density(pyplot, counted, folder))
    paths += [_by_depth(pyplot, counted, arm, folder) for arm in dict.fromkeys(row["arm"] for row in counted)]
    return [path for path in paths if path]


def _against_time(pyplot: Any, rows: Sequence[Row], counted: Sequence[Row], folder: Path) -> Path | None:
    """The frontier: KL to dense inside texts, and recall, against the seconds of an arm's prefill; a column of panels
    for each length. Down and left is better above, up and left below."""
    panels = {"KL to dense inside a text, nats": ("kl", [row for row in rows if row["task"] == TEXT_TASKS[0]])}
    if counted:
        panels["recall, all tasks that dense can do"] = ("recall", list(counted))
    lengths = sorted({row["length"] for _, here in panels.values() for row in here})
    if not lengths:
        return None
    figure, axes = pyplot.subplots(
        len(panels), len(lengths), figsize=(4.2 * len(lengths), 3.4 * len(panels)), squeeze=False
    )
    colours = {arm: f"C{place}" for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows))}
    for y, (title, (value, here)) in enumerate(panels.items()):
        for x, length in enumerate(lengths):
            panel = axes[y][x]
            points = by_time([row for row in here if row["length"] == length], value)
            for (arm, precision), (seconds, mean) in points.items():
                marker, label = ("o", arm) if precision != "fp8" else ("s", f"{arm}, fp8")
                panel.plot(seconds, mean, marker, color=colours[arm], alpha=0.8, label=label)
            panel.set_visible(bool(points))
            panel.set_title(f"{length:,} tokens", fontsize=9)
            panel.set_xlabel("seconds of prefill, median")
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
        axes[y][0].set_ylabel(title)
    _add_legend(figure, axes)
    return _save(pyplot, figure, folder / "frontier.png")


def by_time(rows: Sequence[Row], value: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(median seconds of a prefill, mean of `value`) of each arm and precision."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row[value] is not None:
            found.setdefault((row["arm"], row["precision"]), []).append(row)
    return {
        key: (float(np.median([row["prefill_seconds"] for row in each])), float(np.mean([row[value] for row in each])))
        for key, each in found.items()
    }


def _against_density(pyplot: Any, rows: Sequence[Row], folder: Path) -> Path:
    """A panel for each length and group of tasks; a line for each arm."""
    lengths, groups = sorted({row["length"] for row in rows}), sorted({*map(group, rows)})
    figure, axes = pyplot.subplots(
        len(lengths), len(groups), figsize=(4.2 * len(groups), 3.4 * len(lengths)), squeeze=False, sharey=True
    )
    for y, length in enumerate(lengths):
        for x, name in enumerate(groups):
            panel = axes[y][x]
            here = [row for row in rows if row["length"] == length and group(row) == name]
            for arm, points in _lines(here).items():
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=arm)
            panel.set_title(f"{name}, {length:,} tokens", fontsize=9)
            panel.set_xlabel("density (kept causal blocks)")
            panel.set_ylim(-0.03, 1.03)
            panel.grid(alpha=0.3)
        axes[y][0].set_ylabel("recall")
    _add_legend(figure, axes)
    return _save(pyplot, figure, folder / "recall-by-density.png")


def _add_legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, beside them."""
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """(density, recall) of each arm, block size and tail, by density; dense is a line across."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        label = row["arm"]
        if row["block_size"]:
            label += f" B{row['block_size']}"
        found.setdefault(label, {}).setdefault(round(row["density"], 2), []).append(row["recall"])
    lines = {arm: sorted((at, float(np.mean(values))) for at, values in by.items()) for arm, by in found.items()}
    if "dense" in lines:
        lines["dense"] = [(0.0, lines["dense"][0][1]), (1.0, lines["dense"][0][1])]
    return lines


def _by_depth(pyplot: Any, rows: Sequence[Row], arm: str, folder: Path) -> Path | None:
    """Heat map of an arm's retrieval recall: depth of the needle by length, all its settings pooled."""
    mine = [row for row in rows if row["arm"] == arm and row["depth"] is not None and group(row) == "retrieval"]
    lengths = sorted({row["length"] for row in mine})
    if not mine:
        return None
    grid = np.full((DEPTHS, len(lengths)), np.nan)
    for x, length in enumerate(lengths):
        for y in range(DEPTHS):
            here = [
                row["recall"]
                for row in mine
                if row["length"] == length and min(DEPTHS - 1, int(row["depth"] * DEPTHS)) == y
            ]
            if here:
                grid[y, x] = np.mean(here)
    figure, panel = pyplot.subplots(figsize=(1.6 + 0.9 * len(lengths), 4.2))
    image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    panel.set_yticks(range(DEPTHS), [f"{(y + 0.5) / DEPTHS:.0%}" for y in range(DEPTHS)])
    panel.set_xlabel("tokens")
    panel.set_ylabel("depth of the needle")
    panel.set_title(arm, fontsize=10)
    figure.colorbar(image, label="recall")
    name = "".join(c if c.isalnum() else "-" for c in arm)
    return _save(pyplot, figure, folder / f"recall-by-depth-{name}.png")
