"""The benchmark's results as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """(what, Hugging Face, each arm in order), as far as it was measured."""
    return [row for row in _all_rows(results) if any(row[1:])]


def _point(arm: dict[str, Any], length: int) -> dict[str, Any]:
    return next((point for point in arm.get("latency", []) if point["prompt_tokens"] == length), {})


def _generate(results: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {point["prompt_tokens"]: point for point in results.get("baseline", {}).get("points", [])}


def _lengths(results: dict[str, Any]) -> list[int]:
    measured = {p["prompt_tokens"] for arm in results["engine"].values() for p in arm.get("latency", [])}
    return sorted(measured | set(_generate(results)))


def _all_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    arms = list(results["engine"].values())
    generate = _generate(results)
    table: list[tuple[str, ...]] = []
    for length in _lengths(results):
        points = [generate.get(length, {}), *(_point(arm, length) for arm in arms)]
        name = f"{length:,} tokens"
        reference = points[0].get("first_token_seconds")
        table.append(
            (f"{name}: first token", *(_times(p.get("first_token_seconds"), reference, "{:.2f} s") for p in points))
        )
        table.append((f"{name}: density", *(_text(p.get("density"), "{:.3f}") for p in points)))
        table.append((f"{name}: decode step", *(_text(p.get("decode_step_ms"), "{:.1f} ms") for p in points)))
        table.append((f"{name}: peak memory", *(_text(_gib(p.get("peak_bytes")), "{:.1f} GiB") for p in points)))
    steps = {(p["documents"], p["prompt_tokens"]) for arm in arms for p in arm.get("decode", [])}
    for documents, length in sorted(steps):
        cells = [
            next((_text(p["step_ms"], "{:.1f} ms") for p in arm.get("decode", []) if _same(p, documents, length)), "")
            for arm in arms
        ]
        table.append((f"decode step, {documents} x {length:,}", "", *cells))
    jobs = [results.get("baseline", {}).get("job", {}), *(arm.get("job", {}) for arm in arms)]
    reference = jobs[0].get("seconds")
    table.append(("job: seconds", *(_times(j.get("seconds"), reference, "{:.1f} s") for j in jobs)))
    table.append(("job: density", *(_text(j.get("density"), "{:.3f}") for j in jobs)))
    table.append(("job: documents an hour", *(_text(j.get("documents_per_hour"), "{:.1f}") for j in jobs)))
    table.append(("job: output tokens/s", *(_text(j.get("output_tokens_per_second"), "{:.1f}") for j in jobs)))
    table.append(("job: GPU utilisation (driver)", *(_text(j.get("gpu_utilisation"), "{:.1%}") for j in jobs)))
    busy = [arm.get("busy") or {} for arm in arms]
    table.append(("GPU busy (profiler)", "", *(_text(b.get("busy_share"), "{:.1%}") for b in busy)))
    profiles = [arm.get("profile") or {} for arm in arms]
    for group in ("linears", "attention", "selection", "elementwise", "other"):
        cells = [_text(p.get("groups_ms", {}).get(group), "{:.0f} ms") for p in profiles]
        table.append((f"profile: {group}", "", *cells))
    table.append(("profile: nothing runs", "", *(_text(p.get("gaps_ms"), "{:.0f} ms") for p in profiles)))
    return table


def _same(point: dict[str, Any], documents: int, length: int) -> bool:
    return (point["documents"], point["prompt_tokens"]) == (documents, length)


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """By arm, how many times faster than generate, and than the engine's own dense attention in 16 bits.

    {arm: {"first_token_vs_generate": {length: x}, "first_token_vs_own_dense": ..., "job_vs_generate": x, ...}}
    """
    own = results["engine"].get("dense-bf16") or results["engine"].get("dense-fp32") or {}
    generate = _generate(results)
    found: dict[str, Any] = {}
    for name, arm in results["engine"].items():
        ours = found[name] = {}
        for label, point in (
            ("first_token_vs_generate", lambda length: generate.get(length, {})),
            ("first_token_vs_own_dense", lambda length: _point(own, length)),
        ):
            pairs = {
                n: (point(n).get("first_token_seconds"), _point(arm, n).get("first_token_seconds"))
                for n in _lengths(results)
            }
            ours[label] = {n: theirs / mine for n, (theirs, mine) in pairs.items() if theirs and mine}
        seconds = arm.get("job", {}).get("seconds")
        for label, other in (("job_vs_generate", results.get("baseline", {})), ("job_vs_own_dense", own)):
            theirs = other.get("job", {}).get("seconds")
            if seconds and theirs:
                ours[label] = theirs / seconds
    return found


def show(results: dict[str, Any]) -> None:
    """Print what there is so far."""
    console = Console(width=160)
    agreement = results.get("agreement", [])
    for check in agreement:
        console.print(_agreement(check), highlight=False)
    stamp = results["stamp"]
    title = (
        f"{results['shape']} on {stamp.get('gpu', stamp['device'])}, torch {stamp['torch']}, commit {stamp['commit']}"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("", "HF generate, sdpa", *results["engine"]):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    if "job" in results.get("baseline", {}):
        console.print(f"HF job: {results['baseline']['job']['how']}", highlight=False)
    for model, errors in results.get("error", {}).items():
        console.print(f"against {errors['against']}, {model}, {errors['prompt_tokens']:,} tokens:", highlight=False)
        for variant in errors["variants"]:
            console.print(_error(variant), highlight=False)
    for kind in ("skipped", "failed"):
        for line in results.get(kind, []):
            console.print(f"{kind}: {line}", highlight=False)


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


def _error(variant: dict[str, Any]) -> str:
    return (
        f"  {variant['variant']:<30} density {variant['density']:.3f}, hidden states "
        f"{variant['last_layer_error']:.2%}, KL mean {variant['kl_mean']:.2e}, last token "
        f"{variant['kl_last_token']:.2e}, same token {variant['same_token']:.1%}"
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
