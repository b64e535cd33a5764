"""The benchmark's results as a table and a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells under headings(), as far as something was measured."""
    return [row for row in _all_rows(results) if any(row[1:])]


def _point(arm: dict[str, Any], length: int) -> dict[str, Any]:
    return next((point for point in arm.get("latency", []) if point["prompt_tokens"] == length), {})


def _generate(results: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {point["prompt_tokens"]: point for point in results.get("baseline", {}).get("points", [])}


def _lengths(results: dict[str, Any]) -> list[int]:
    theirs = results.get("vllm", {}).values()
    measured = {p["prompt_tokens"] for arm in (*results["engine"].values(), *theirs) for p in arm.get("latency", [])}
    return sorted(measured | set(_generate(results)))


def headings(results: dict[str, Any]) -> list[str]:
    """Of the columns of rows(): generate, vLLM in each precision, each arm, and how much faster than vLLM it is."""
    theirs = [f"vLLM {precision}" for precision in results.get("vllm", {})]
    return ["", "HF generate, sdpa", *theirs, *results["engine"], *(f"{arm} / vLLM" for arm in _compared(results))]


def _compared(results: dict[str, Any]) -> list[str]:
    """Arms in a precision in which vLLM has figures."""
    return [name for name in results["engine"] if _peer(results, name).keys() & {"latency", "job", "questions"}]


def _peer(results: dict[str, Any], arm: str) -> dict[str, Any]:
    """vLLM in the precision of an arm, "stem-fp8" say."""
    return results.get("vllm", {}).get(arm.rpartition("-")[2], {})


def _all_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    arms, peers = list(results["engine"].values()), list(results.get("vllm", {}).values())
    generate, factors = _generate(results), ratios(results)
    table: list[tuple[str, ...]] = []

    def add(name: str, cells: list[str], vs_vllm: Callable[[dict[str, Any]], float | None] = lambda _: None) -> None:
        """cells: of generate, vLLM and the arms; those of the arms alone may come alone."""
        blank = [""] * (1 + len(peers) + len(arms) - len(cells))
        table.append((name, *blank, *cells, *(_text(vs_vllm(factors[arm]), "{:.2f}x") for arm in _compared(results))))

    def told(cells: list[str]) -> list[str]:
        """With a word in the cells of a vLLM that is not there."""
        here = ["not installed" if "missing" in peer else cells[i] for i, peer in enumerate(peers, 1)]
        return [cells[0], *here, *cells[1 + len(peers) :]]

    for length in _lengths(results):
        points = [generate.get(length, {}), *(_point(found, length) for found in (*peers, *arms))]
        name = f"{length:,} tokens"
        reference = points[0].get("first_token_seconds")
        add(
            f"{name}: first token",
            told([_times(point.get("first_token_seconds"), reference, "{:.2f} s") for point in points]),
            lambda factor, length=length: factor.get("first_token_vs_vllm", {}).get(length),  # type: ignore[misc]
        )
        add(f"{name}: density", [_text(point.get("density"), "{:.3f}") for point in points])
        add(
            f"{name}: decode step",
            [_text(point.get("decode_step_ms"), "{:.1f} ms") for point in points],
            lambda factor, length=length: factor.get("decode_step_vs_vllm", {}).get(length),  # type: ignore[misc]
        )
        add(f"{name}: peak memory", [_text(_gib(point.get("peak_bytes")), "{:.1f} GiB") for point in points])
    steps = {(p["documents"], p["prompt_tokens"]) for arm in arms for p in arm.get("decode", [])}
    for documents, length in sorted(steps):
        cells = [
            next((_text(p["step_ms"], "{:.1f} ms") for p in arm.get("decode", []) if _same(p, documents, length)), "")
            for arm in arms
        ]
        add(f"decode step, {documents} x {length:,}", cells)
    jobs = [results.get("baseline", {}).get("job", {}), *(found.get("job", {}) for found in (*peers, *arms))]
    if any(jobs):
        reference = jobs[0].get("seconds")
        seconds = told([_times(j.get("seconds"), reference, "{:.1f} s") for j in jobs])
        add("job: seconds", seconds, lambda factor: factor.get("job_vs_vllm"))
    add("job: density", [_text(j.get("density"), "{:.3f}") for j in jobs])
    add("job: documents an hour", [_text(j.get("documents_per_hour"), "{:.1f}") for j in jobs])
    add("job: output tokens/s", [_text(j.get("output_tokens_per_second"), "{:.1f}") for j in jobs])
    add("job: GPU utilisation (driver)", [_text(j.get("gpu_utilisation"), "{:.1%}") for j in jobs])
    asked = [{}, *(found.get("questions", {}) for found in (*peers, *arms))]
    for figure in ("one_seconds", "all_seconds", "job_seconds", "job_of_one_question_seconds"):
        seconds = told([_text(found.get(figure), "{:.2f} s") for found in asked]) if any(asked) else []
        add(
            f"questions: {figure}",
            seconds,
            lambda factor, figure=figure: factor.get(f"questions_{figure}_vs_vllm"),  # type: ignore[misc]
        )
    for figure in ("all_vs_one", "jobs_vs_questions", "step_vs_one"):
        add(f"questions: {figure}", [_text(found.get(figure), "{:.2f}x") for found in asked])
    for figure in ("step_of_one_ms", "step_of_all_ms", "step_of_one_whole_prompt_ms"):
        add(f"questions: {figure}", [_text(found.get(figure), "{:.2f} ms") for found in asked])
    looked = [arm.get("lookup") or {} for arm in arms]
    places = dict.fromkeys((p["documents"], p["prompt_tokens"]) for found in looked for p in found.get("steps", []))
    for documents, length in places:
        points = [next((p for p in found.get("steps", []) if _same(p, documents, length)), {}) for found in looked]
        add(
            f"lookup, {documents} x {length:,}: step with drafts over plain",
            [_text(point.get("cost"), "{:.3f}x") for point in points],
        )
    trained = results.get("lookup_of_trained", {})
    by_arm = [trained.get(name.rsplit("-", 1)[1], {}) for name in results["engine"]]
    for model, runs in (("random", [found.get("random", {}) for found in looked]), ("trained", by_arm)):
        per_step = [each.get("auto", {}).get("tokens_per_step") for each in runs]
        add(f"lookup, {model}: tokens of a step", [_text(tokens, "{:.2f}") for tokens in per_step])
        gains = [each["off"]["decode_seconds"] / each["auto"]["decode_seconds"] if each else None for each in runs]
        add(f"lookup, {model}: decode, times as fast", [_text(gain, "{:.2f}x") for gain in gains])
    busy = [arm.get("busy") or {} for arm in arms]
    add("GPU busy (profiler)", [_text(b.get("busy_share"), "{:.1%}") for b in busy])
    profiles = [arm.get("profile") or {} for arm in arms]
    for group in ("linears", "attention", "selection", "elementwise", "other"):
        add(f"profile: {group}", [_text(p.get("groups_ms", {}).get(group), "{:.0f} ms") for p in profiles])
    add("profile: nothing runs", [_text(p.get("gaps_ms"), "{:.0f} ms") for p in profiles])
    return table


def _same(point: dict[str, Any], documents: int, length: int) -> bool:
    return (point["documents"], point["prompt_tokens"]) == (documents, length)


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """By arm, how many times faster than generate, than the engine's own dense attention in 16 bits, and than vLLM in
    the arm's precision.

    {arm: {"first_token_vs_generate": {length: x}, "first_token_vs_own_dense": ..., "job_vs_generate": x, ...}}
    """
    own = results["engine"].get("dense-bf16") or results["engine"].get("dense-fp32") or {}
    generate = _generate(results)
    found: dict[str, Any] = {}
    for name, arm in results["engine"].items():
        ours = found[name] = {}
        peer = _peer(results, name)
        for label, figure, point in (
            ("first_token_vs_generate", "first_token_seconds", lambda length: generate.get(length, {})),
            ("first_token_vs_own_dense", "first_token_seconds", lambda length: _point(own, length)),
            ("first_token_vs_vllm", "first_token_seconds", lambda length, peer=peer: _point(peer, length)),
            ("decode_step_vs_vllm", "decode_step_ms", lambda length, peer=peer: _point(peer, length)),
        ):
            pairs = {n: (point(n).get(figure), _point(arm, n).get(figure)) for n in _lengths(results)}  # type: ignore[operator]
            ours[label] = {n: theirs / mine for n, (theirs, mine) in pairs.items() if theirs and mine}
        seconds = arm.get("job", {}).get("seconds")
        others = {"job_vs_generate": results.get("baseline", {}), "job_vs_own_dense": own, "job_vs_vllm": peer}
        for label, other in others.items():
            theirs = other.get("job", {}).get("seconds")
            if seconds and theirs:
                ours[label] = theirs / seconds
        for figure, mine in arm.get("questions", {}).items():
            theirs = peer.get("questions", {}).get(figure)
            if figure.endswith("_seconds") and mine and theirs:
                ours[f"questions_{figure}_vs_vllm"] = theirs / mine
    return found


def show(results: dict[str, Any]) -> None:
    """Print what there is so far."""
    console = Console(width=max(160, 22 * len(headings(results))))
    agreement = results.get("agreement", [])
    for check in agreement:
        console.print(_agreement(check), highlight=False)
    stamp = results["stamp"]
    title = (
        f"{results['shape']} on {stamp.get('gpu', stamp['device'])}, torch {stamp['torch']}, commit {stamp['commit']}"
    )
    table = Table(title=title, title_justify="left")
    for heading in headings(results):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    if "job" in results.get("baseline", {}):
        console.print(f"HF job: {results['baseline']['job']['how']}", highlight=False)
    for precision, found in results.get("vllm", {}).items():
        console.print(f"vLLM {precision}: {_vllm(found)}", highlight=False)
    for model, errors in results.get("error", {}).items():
        console.print(f"against {errors['against']}, {model}, {errors['prompt_tokens']:,} tokens:", highlight=False)
        for variant in errors["variants"]:
            console.print(_error(variant), highlight=False)
    for kind in ("skipped", "failed"):
        for line in results.get(kind, []):
            console.print(f"{kind}: {line}", highlight=False)


def plot(results: dict[str, Any], path: Path) -> str:
    """First token and decode step by length, documents an hour, as far as they were measured, saved as an image.

    Returns why there is none, empty if there is.
    """
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is missing (pip install -e '.[bench]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    baseline = results.get("baseline", {})
    measured = {"generate, sdpa": {"latency": baseline.get("points", []), "job": baseline.get("job", {})}}
    measured |= {f"vLLM {precision}": found for precision, found in results.get("vllm", {}).items()}
    measured |= {f"Stemline {arm}": found for arm, found in results.get("engine", {}).items()}
    measured = {name: found for name, found in measured.items() if found.get("latency") or found.get("job")}
    lengths = sorted({point["prompt_tokens"] for found in measured.values() for point in found.get("latency", [])})
    jobs = {name: found["job"]["documents_per_hour"] for name, found in measured.items() if found.get("job")}
    curves = [("first_token_seconds", "seconds to first token")] if lengths else []
    curves += [("decode_step_ms", "milliseconds of a decode step, one document")] if lengths else []
    if not curves and not jobs:
        return "neither latency nor job was measured"
    colours = {name: f"C{number}" for number, name in enumerate(measured)}
    panels = len(curves) + bool(jobs)
    figure, every = plt.subplots(1, panels, figsize=(13 * panels / 3, 4), squeeze=False)
    for axes, (key, title) in zip(every[0], curves, strict=False):
        for name, found in measured.items():
            points = sorted((p for p in found.get("latency", []) if key in p), key=lambda p: int(p["prompt_tokens"]))
            tokens, values = [p["prompt_tokens"] for p in points], [p[key] for p in points]
            axes.plot(tokens, values, "o-", label=name, color=colours[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
        axes.set_title(title)
        axes.grid(alpha=0.3)
    if curves:
        every[0][0].set_yscale("log")
        every[0][0].legend()
        every[0][1].set_ylim(bottom=0)
    if jobs:
        last = every[0][-1]
        last.barh(list(jobs), list(jobs.values()), color=[colours[name] for name in jobs])
        last.invert_yaxis()
        last.set_title("documents an hour, the whole job")
    figure.suptitle(f"{results['shape']}, {results['stamp'].get('gpu', results['stamp']['device'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return ""


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


def _vllm(found: dict[str, Any]) -> str:
    about = found.get("about")
    if about is None:
        return found.get("missing", "no figures")
    how = "without compilation and CUDA graphs" if about["eager"] else "compiled, CUDA graphs"
    how += f"; first tokens are the best of {about['repeats']}"
    return (
        f"{about['vllm']}, torch {about['torch']}, chunks of {about['chunk_tokens']:,} tokens, room for "
        f"{about['kv_tokens']:,}, {how}"
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
