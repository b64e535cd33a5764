"""The benchmark's results as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, Hugging Face, engine dense, engine Stem), as far as it was measured."""
    return [row for row in _all_rows(results) if any(row[1:])]


def _all_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    arms = results.get("engine", {})
    baseline = results.get("baseline", {})
    points = {point["prompt_tokens"]: point for point in baseline.get("points", [])}
    table: list[tuple[str, str, str, str]] = []

    def latency(arm: str, length: int) -> dict[str, Any]:
        found = [p for p in arms.get(arm, {}).get("latency", []) if p["prompt_tokens"] == length]
        return found[0] if found else {}

    lengths = {p["prompt_tokens"] for arm in arms.values() for p in arm.get("latency", [])} | set(points)
    for length in sorted(lengths):
        three = [points.get(length, {}), latency("dense", length), latency("stem", length)]
        name = f"{length:,} tokens"
        reference = three[0].get("first_token_seconds")
        cells = [_times(p.get("first_token_seconds"), reference, "{:.2f} s") for p in three]
        if "density" in three[2]:
            cells[2] += f" at density {three[2]['density']:.3f}"
        table.append((f"{name}: first token", *cells))  # type: ignore[arg-type]
        table.append((f"{name}: decode step", *(_text(p.get("decode_step_ms"), "{:.1f} ms") for p in three)))  # type: ignore[arg-type]
        table.append((f"{name}: peak memory", *(_text(_gib(p.get("peak_bytes")), "{:.1f} GiB") for p in three)))  # type: ignore[arg-type]
    for arm in arms.values():
        for point in arm.get("decode", []):
            name = f"decode step, {point['documents']} x {point['prompt_tokens']:,}"
            table.append((name, "", f"{point['step_ms']:.1f} ms", "same steps"))
    jobs = [baseline.get("job", {}), arms.get("dense", {}).get("job", {}), arms.get("stem", {}).get("job", {})]
    if any(jobs):
        reference = jobs[0].get("seconds")
        table.append(("job: seconds", *(_times(j.get("seconds"), reference, "{:.1f} s") for j in jobs)))  # type: ignore[arg-type]
        table.append(("job: documents an hour", *(_text(j.get("documents_per_hour"), "{:.1f}") for j in jobs)))  # type: ignore[arg-type]
        table.append(("job: output tokens/s", *(_text(j.get("output_tokens_per_second"), "{:.1f}") for j in jobs)))  # type: ignore[arg-type]
        table.append(("job: GPU utilisation (driver)", *(_text(j.get("gpu_utilisation"), "{:.1%}") for j in jobs)))  # type: ignore[arg-type]
    busy = [arms.get(arm, {}).get("busy") or {} for arm in ("dense", "stem")]
    if any(busy):
        table.append(("GPU busy (profiler)", "", *(_text(b.get("busy_share"), "{:.1%}") for b in busy)))  # type: ignore[arg-type]
    return table


def show(results: dict[str, Any]) -> None:
    """Print what there is so far."""
    console = Console(width=140)
    agreement = results.get("agreement", [])
    for check in agreement:
        console.print(_agreement(check), highlight=False)
    stamp = results["stamp"]
    title = (
        f"{results['shape']} on {stamp.get('gpu', stamp['device'])}, torch {stamp['torch']}, commit {stamp['commit']}"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("", "HF generate, sdpa", "engine, dense", "engine, Stem"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    if "job" in results.get("baseline", {}):
        console.print(f"HF job: {results['baseline']['job']['how']}", highlight=False)
    for skipped in results.get("skipped", []):
        console.print(f"skipped: {skipped}", highlight=False)


def plot(results: dict[str, Any], path: Path) -> bool:
    """First token and documents an hour as bars, saved as an image. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    baseline, arms = results.get("baseline", {}), results.get("engine", {})
    series = {"HF generate, sdpa": {p["prompt_tokens"]: p["first_token_seconds"] for p in baseline.get("points", [])}}
    for arm, found in arms.items():
        points = found.get("latency", [])
        series[f"engine, {arm}"] = {p["prompt_tokens"]: p["first_token_seconds"] for p in points}
    lengths = sorted({length for values in series.values() for length in values})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for place, (name, values) in enumerate(series.items()):
        spots = [i + 0.26 * place for i, length in enumerate(lengths) if length in values]
        left.bar(spots, [values[length] for length in lengths if length in values], width=0.25, label=name)
    left.set_xticks([i + 0.26 for i in range(len(lengths))], [f"{length // 1024}K" for length in lengths])
    left.set_ylabel("seconds to first token")
    left.legend()
    jobs = {"HF generate, sdpa": baseline.get("job", {})} | {
        f"engine, {arm}": found.get("job", {}) for arm, found in arms.items()
    }
    jobs = {name: figures for name, figures in jobs.items() if figures}
    right.bar(list(jobs), [figures["documents_per_hour"] for figures in jobs.values()], width=0.5)
    right.set_ylabel("documents an hour")
    figure.suptitle(f"{results['shape']}, {results['stamp'].get('gpu', results['stamp']['device'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _agreement(check: dict[str, Any]) -> str:
    if "error" in check:
        return f"agreement with generate ({check['precision']}): {check['error']}"
    partings = check["partings"]
    gaps = f", largest logit gap {max(p['gap'] for p in partings):.3g}" if partings else ""
    return (
        f"agreement with generate ({check['precision']}): {check['identical_share']:.2%} of {check['tokens']} tokens "
        f"stand before a parting; {len(partings)} of {check['documents']} documents part{gaps}"
        f"{'' if check['ok'] else ': these are NOT ties'}"
    )


def _text(value: float | None, form: str) -> str:
    return "" if not value else form.format(value)


def _times(value: float | None, reference: float | None, form: str) -> str:
    if not value:
        return ""
    factor = f" ({reference / value:.2f}x)" if reference and reference != value else ""
    return form.format(value) + factor


def _gib(value: int | None) -> float | None:
    return None if value is None else value / GIB
