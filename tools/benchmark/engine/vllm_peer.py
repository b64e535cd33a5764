"""vLLM beside the engine: the very same lists of token ids, in a process of its own, so that the GPU's memory is free.

Needs vLLM importable by --vllm-python (this interpreter unless given), with --vllm-path before its PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import EngineConfig
from pipeline.engine.devices import release_memory
from tools.benchmark.engine.phases import random_prompts
from tools.benchmark.engine.questions import Prompts, prompts_of
from tools.benchmark.engine.run import Run
from tools.benchmark.engine.vllm_child import MARK

ROOT = Path(__file__).resolve().parents[3]
CHILD = Path(__file__).with_name("vllm_child.py")
PRECISIONS = ("bf16", "fp8")  # of ours that vLLM is run in
# The child looks at the clock between its measurements only.
GRACE_SECONDS = 60.0
MEMORY_SHARE = 0.92
# Stop ids were taken out of the config; vLLM gets some, which outputs ignore, as they stand in any published one.
STOPS = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}

Note = Callable[[dict[str, Any]], None]


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The flags of this phase."""
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PATH", help="interpreter that has vLLM")
    parser.add_argument("--vllm-path", metavar="DIR", help="folder before the PYTHONPATH of vLLM's process alone")
    parser.add_argument("--vllm-chunk-tokens", type=int, default=16384, help="its max_num_batched_tokens (16384)")
    parser.add_argument("--vllm-repeats", type=positive, default=2, help="first tokens to time; the best counts (2)")
    parser.add_argument("--vllm-seconds", type=float, default=600.0, help="for vLLM in each precision (600)")


def run_phase(
    run: Run, config: EngineConfig, precision: str, job: Sequence[int], vocabulary: int, scratch: Path
) -> None:
    """The latencies and the job of the engine, by vLLM; each finding is printed and written as it comes.

    job: lengths of its documents, in their order. scratch: a folder for what vLLM reads.
    """
    arguments = run.arguments

    def measure() -> None:
        release_memory(config.torch_device())
        found = run.results["vllm"].setdefault(precision, {})
        left = arguments.limit_seconds - (time.perf_counter() - run.begin)
        plan = plan_of(
            scratch, Path(config.model),
            arguments.latency_lengths if "latency" in arguments.phases else [],
            job if "job" in arguments.phases else [],
            arguments.new_tokens, vocabulary,
            precision=precision, max_context=config.max_context, max_live=arguments.max_live,
            chunk_tokens=arguments.vllm_chunk_tokens, repeats=arguments.vllm_repeats,
            seconds=min(arguments.vllm_seconds, left),
        )  # fmt: skip

        def note(finding: dict[str, Any]) -> None:
            what = finding.pop("what")
            if what in ("skipped", "failed"):
                run.results[what].append(f"vllm: {precision}: {finding['reason']}")
            elif what == "latency":
                found.setdefault("latency", []).append(finding)
            else:
                found[what] = finding["reason"] if what == "missing" else finding
            print(f"  vLLM {precision}, {what}: {finding}", flush=True)
            run.write()

        log = run.folder / f"vllm-{precision}.log"
        if plan["lengths"] or plan["documents"] or "questions" not in arguments.phases:
            measure_vllm(plan, arguments.vllm_python, arguments.vllm_path, log, note)
        if "questions" in arguments.phases:  # in an engine of its own: one that caches what it has read
            plan = questions_plan(plan, prompts_of(arguments, vocabulary))
            log = run.folder / f"vllm-{precision}-questions.log"
            measure_vllm(plan, arguments.vllm_python, arguments.vllm_path, log, note)

    run.phase(f"vllm: {precision}", measure)


def plan_of(
    folder: Path, model: Path, lengths: Sequence[int], job: Sequence[int], new_tokens: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """What the child is to do, as plain values; its prompts and model config are written to `folder`.

    model: folder of the config. lengths: single documents; job: those of the job, in their order; their token ids are
    those of `tools.benchmark.engine.phases`. more: precision, max_context, max_live, chunk_tokens, repeats, seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    stops = {name: value for name, value in STOPS.items() if config.get(name) is None}
    (folder / "config.json").write_text(json.dumps(config | stops), encoding="utf-8")
    single = [random_prompts([length], vocabulary)[0] for length in lengths]
    prompts = {f"single{i}": ids for i, ids in enumerate(single)}
    prompts |= {f"job{i}": ids for i, ids in enumerate(random_prompts(job, vocabulary))}
    np.savez(folder / "prompts.npz", **prompts)  # type: ignore[arg-type]
    return {
        "model": str(folder), "prompts": str(folder / "prompts.npz"), "lengths": list(lengths), "documents": len(job),
        "new_tokens": new_tokens, "step_tokens": min(new_tokens, 129), "memory_share": MEMORY_SHARE, "eager": False,
    } | more  # fmt: skip


def questions_plan(plan: dict[str, Any], prompts: Prompts) -> dict[str, Any]:
    """The same for the phase of questions alone, with vLLM's prefix cache. Writes its prompts beside the others."""
    texts = {"questions_one": prompts.one, "questions_many": prompts.many}
    texts |= {f"questions_asked{i}": ids for i, ids in enumerate(prompts.asked)}
    texts |= {f"questions_job{i}": ids for i, ids in enumerate(prompts.job)}
    place = Path(plan["model"]) / "questions.npz"
    np.savez(place, **texts)  # type: ignore[arg-type]
    counts = [len(prompts.asked), prompts.each, len(prompts.job)]
    return plan | {"prompts": str(place), "lengths": [], "documents": 0, "questions": counts}


def measure_vllm(plan: dict[str, Any], python: str, path: str | None, log: Path, note: Note) -> None:
    """Run the child; `note` gets each of its findings. A vLLM that fails to start is tried without compilation."""
    started = again = False

    def noted(finding: dict[str, Any]) -> None:
        nonlocal started, again
        started = started or finding["what"] == "about"
        if finding["what"] == "failed" and finding.get("alive") and not started and not plan["eager"]:
            again = True
            finding = {"what": "skipped", "reason": f"compiled: {finding['reason']}; now without compilation"}
        note(finding)

    _run(plan, python, path, log, noted)
    if again:
        plan = plan | {"eager": True}
        _run(plan, python, path, log.with_suffix(".eager.log"), noted)


def _run(plan: dict[str, Any], python: str, path: str | None, log: Path, note: Note) -> None:
    file = Path(plan["model"]) / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    # Not with this checkout, nor in it: its `kernels` is not the package of that name that transformers looks for.
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = [place for place in inherited if place and Path(place).resolve() != ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(([str(Path(path).absolute())] if path else []) + places)}
    interpreter = str(Path(python).absolute()) if os.sep in python else python
    ended = killed = False
    with (
        log.open("w", encoding="utf-8") as told,
        subprocess.Popen(
            [interpreter, "-P", str(CHILD), str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment, cwd=file.parent, start_new_session=True,
        ) as child,
    ):  # fmt: skip

        def kill() -> None:
            nonlocal killed
            killed = True
            _kill(child.pid)

        clock = threading.Timer(plan["seconds"] + GRACE_SECONDS, kill)
        clock.start()
        try:
            assert child.stdout
            for line in child.stdout:
                if not line.startswith(MARK):
                    told.write(line)
                elif (finding := json.loads(line.removeprefix(MARK)))["what"] == "end":
                    ended = True
                    break
                else:
                    note(finding)
        finally:
            clock.cancel()
            _kill(child.pid)  # with the helpers that it may have left
    if not ended:
        why = f"no end after {plan['seconds']:.0f} s" if killed else f"it died with exit code {child.returncode}"
        note({"what": "failed", "reason": f"{why}; see {log}"})


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
