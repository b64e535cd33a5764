"""Documents through the engine, through vLLM and through Hugging Face generate (sdpa, one at a time), in one run.

First it asks whether both write the same tokens (bundled trained model, dense, greedy); if they do not, nothing is
timed. Then, on random weights of the asked shape, for each arm (Stem or dense, in each precision): time to first token,
what it consists of, decode steps, peak memory, documents an hour; the same documents through vLLM, in bf16 and fp8 as
the arms are, where it is installed; and the error of each arm against dense bf16.
Results are written to OUTPUT/engine.json after every phase.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Engine, EngineConfig
from pipeline.engine.model.loading import load_config, load_precision
from pipeline.errors import JobError
from pipeline.settings.shared import PRECISIONS
from stem_core.config import PRESETS, StemConfig
from tools.benchmark.engine import vllm_peer
from tools.benchmark.engine.agreement import MODEL, check_agreement
from tools.benchmark.engine.baseline import Baseline, BaselinePoint, job_baseline
from tools.benchmark.engine.breakdown import profile_prefill
from tools.benchmark.engine.errors import measure_errors, real_prompt
from tools.benchmark.engine.lookup import lookup, lookup_of_trained
from tools.benchmark.engine.phases import decode_by_batch, gpu_busy, job, latency, random_prompts, warm_up
from tools.benchmark.engine.questions import ask, prompts_of
from tools.benchmark.engine.report import plot, show
from tools.benchmark.engine.run import Run
from tools.shapes import ALIASES, SHAPES, shape_folder

PHASES = (
    "agreement",
    "baseline",
    "latency",
    "profile",
    "job",
    "questions",
    "decode",
    "lookup",
    "busy",
    "vllm",
    "error",
)
# generate and vLLM run on one GPU, and what a profile says of idle time holds for one.
ONE_GPU = ("baseline", "profile", "busy", "vllm")
ATTENTIONS = ("stem", "dense")


@dataclass(frozen=True)
class Arm:
    """One way to run the engine, "stem-fp8" say."""

    name: str
    config: EngineConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    shapes = ", ".join((*SHAPES, *ALIASES))
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"{shapes} or a model folder's config")
    parser.add_argument("--output", default="benchmark", help="folder for engine.json and engine.png")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--gpus-per-worker", type=_positive, default=1, metavar="K", help="spread the layers over K GPUs (1)"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["auto"], help="each makes its own arms")
    parser.add_argument("--arms", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--precise", action="store_true", help="fp8 linears without fast accumulation")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 98304, 65536, 32768], metavar="N")
    parser.add_argument("--documents", type=int, default=16, help="documents of the job, over the lengths in turn")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--main-arms", nargs="+", metavar="ARM", help="job and profile of these only, e.g. stem-fp8")
    parser.add_argument("--latency-lengths", type=int, nargs="+", default=[131072, 65536, 32768], metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3, 4, 8], metavar="N")
    parser.add_argument("--baseline-steps", type=int, default=16, help="decode steps of generate to time, per length")
    parser.add_argument("--questions", type=_positive, default=20, metavar="N", help="to the longest document (20)")
    parser.add_argument("--questions-each", type=_positive, default=5, metavar="N", help="to those of the job (5)")
    parser.add_argument("--question-tokens", type=_positive, default=128, metavar="N")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="instead of --budget")
    parser.add_argument("--budget", "--density", type=float, default=0.25, help="Stem's share of blocks (0.25)")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dense-layers", type=int, help="Stem's leading dense layers (unset: the preset's, or 2)")
    parser.add_argument(
        "--base-blocks", type=int, help="blocks that every row keeps with sampled (unset: the preset's)"
    )
    parser.add_argument(
        "--max-output-error",
        type=float,
        default=0.0,
        metavar="X",
        help="Stem measures its output error, and reads densely again beyond",
    )
    parser.add_argument("--chunk-tokens", type=int, default=EngineConfig.chunk_tokens)
    parser.add_argument("--max-live", type=int, default=16)
    parser.add_argument("--agreement-tokens", type=int, nargs="+", default=[1200, 2500, 5000, 8000], metavar="N")
    parser.add_argument("--error-tokens", type=int, default=16384, help="prompt of the phase error, random weights")
    parser.add_argument("--error-document", type=int, default=8000, help="the same for the trained model's document")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    vllm_peer.add_arguments(parser, _positive)
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="start no phase after this many seconds")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(arguments: argparse.Namespace) -> int:
    """Run all phases; 0, 2 if engine and generate do not agree, 1 if a phase failed."""
    alone = [name for name in ONE_GPU if name in arguments.phases]
    if arguments.gpus_per_worker > 1 and alone:
        raise JobError(f"--gpus-per-worker: {', '.join(alone)} run on one GPU; leave them out of --phases")
    with tempfile.TemporaryDirectory() as scratch:
        folder = shape_folder(arguments.shape, Path(scratch) / "shape")
        config = EngineConfig(
            str(folder),
            device=arguments.device,
            gpus=arguments.gpus_per_worker,
            load_format="dummy",
            chunk_tokens=arguments.chunk_tokens,
            max_live=arguments.max_live,
            max_context=max(*arguments.lengths, *arguments.latency_lengths)
            + max(arguments.new_tokens, 64)
            + ("questions" in arguments.phases) * arguments.question_tokens,
            fp8_fast_accumulation=not arguments.precise,
            # Random weights repeat themselves, and drafts would guess it: of this, the phase lookup alone tells.
            prompt_lookup="off",
        )
        config.torch_devices()  # are they there?
        stem = _stem(arguments)
        arms = _arms(arguments, config, stem)
        run = Run(arguments, config)
        run.phase("agreement", lambda: _agreement(run, config))
        if not all(check["ok"] for check in run.results.get("agreement", [])):
            show(run.results)
            print("engine and generate do not write the same tokens: nothing was timed")
            return 2
        run.phase("questions: agreement", lambda: _questions_agree(run, config))
        run.phase("lookup: trained model", lambda: _lookup_of_trained(run, config))
        run.phase("baseline", lambda: _baseline(run, config))
        vocabulary = load_config(config).get_text_config().vocab_size
        for arm in arms:
            _one_document(run, arm, vocabulary)
        for arm in arms:
            first = next(a for a in arms if a.config.precision == arm.config.precision) is arm
            _many_documents(run, arm, vocabulary, with_decode=first)
        for precision in dict.fromkeys(load_precision(arm.config).name for arm in arms):
            if precision in vllm_peer.PRECISIONS:
                lengths, place = _job_lengths(arguments), Path(scratch) / f"vllm-{precision}"
                vllm_peer.run_phase(run, config, precision, lengths, vocabulary, place)
        _errors(run, config, stem, vocabulary)
    show(run.results)
    if why := plot(run.results, run.folder / "engine.png"):
        print(f"no plot: {why}")
    print(f"written to {run.folder / 'engine.json'}")
    return 1 if run.results["failed"] else 0


def _stem(arguments: argparse.Namespace) -> StemConfig:
    common = {"block_size": arguments.block_size, "max_output_error": arguments.max_output_error}
    for name in ("dense_layers", "base_blocks"):
        if (value := getattr(arguments, name)) is not None:
            common[name] = value
    try:
        if arguments.preset:
            return StemConfig.preset(arguments.preset, **common)
        return StemConfig(schedule="density", density=arguments.budget, **common)
    except ValueError as error:
        raise JobError(f"--budget, --preset, --max-output-error: {error}") from error


def _arms(arguments: argparse.Namespace, config: EngineConfig, stem: StemConfig) -> list[Arm]:
    """In the order of --arms, then of --precision, by their resolved names."""
    arms = []
    for attention in arguments.arms:
        for asked in arguments.precision:
            made = replace(config, precision=asked, attention=stem if attention == "stem" else None)
            arms.append(Arm(f"{attention}-{load_precision(made).name}", made))
    names = [arm.name for arm in arms]
    arguments.main_arms = arguments.main_arms or names
    for name in arguments.main_arms:
        if name not in names:
            raise JobError(f"--main-arms {name}: there are {', '.join(names)}")
    return arms


def _job_lengths(arguments: argparse.Namespace) -> list[int]:
    """The job's documents, longest first, as the scheduler hands them out."""
    lengths = [arguments.lengths[i % len(arguments.lengths)] for i in range(arguments.documents)]
    return sorted(lengths, reverse=True)


def _agreement(run: Run, config: EngineConfig) -> None:
    precisions = ["fp32"] if config.torch_device().type == "cpu" else ["fp32", "bf16"]
    lengths = run.arguments.agreement_tokens
    run.results["agreement"] = [check_agreement(config.device, precision, lengths, 48) for precision in precisions]


def _questions_agree(run: Run, config: EngineConfig) -> None:
    """Raises JobError where prompts behind a shared prefix are not continued as generate continues them."""
    lengths = [min(length, 2500) for length in run.arguments.agreement_tokens[:2]]
    found = check_agreement(config.device, "fp32", lengths, 32, shared=True)
    run.results["questions_agreement"] = found
    if not found["ok"]:
        raise JobError("requests that share a prefix do not write generate's tokens: their times mean nothing")


def _lookup_of_trained(run: Run, config: EngineConfig) -> None:
    found = run.results["lookup_of_trained"] = {}
    for asked in run.arguments.precision:
        made = replace(config, precision=asked)
        found[load_precision(made).name] = lookup_of_trained(config.device, asked)


def _baseline(run: Run, config: EngineConfig) -> None:
    arguments = run.arguments
    points: dict[int, BaselinePoint] = {}
    found: dict[str, Any] = {}
    run.results["baseline"] = found
    wanted = set(arguments.latency_lengths) | (set(arguments.lengths) if "job" in arguments.phases else set())
    prompts = {n: torch.arange(n).remainder(1000).numpy() for n in wanted}
    # Out of memory skips the phase: the model must not stay for the next one.
    with closing(Baseline(config)) as baseline:
        for length in sorted(prompts):
            points[length] = baseline.measure(prompts[length], arguments.baseline_steps)
            found["points"] = [asdict(point) for point in points.values()]
            run.write()
    if "job" in arguments.phases:
        found["job"] = job_baseline(points, _job_lengths(arguments), arguments.new_tokens)


def _one_document(run: Run, arm: Arm, vocabulary: int) -> None:
    """Latency and its breakdown, in an arena for one document, so that the peak is what such a document needs."""
    arguments = run.arguments
    profiled = arm.name in arguments.main_arms and "profile" in arguments.phases
    if not profiled and "latency" not in arguments.phases:
        return
    longest, new = max(arguments.latency_lengths), arguments.new_tokens

    def measure() -> None:
        def breakdown() -> None:
            found["profile"] = profile_prefill(engine, longest, vocabulary)

        begin = time.perf_counter()
        with closing(Engine(replace(arm.config, arena_tokens=longest + new, max_live=1))) as engine:
            found["load_seconds"] = time.perf_counter() - begin
            found["about"], found["plan_of_one"] = engine.describe(), engine.plan().to_dict()
            warm_up(engine, vocabulary)
            points: list[dict[str, Any]] = found.setdefault("latency", [])
            for length in arguments.latency_lengths if "latency" in arguments.phases else []:
                points += latency(engine, [length], min(new, 65), vocabulary)
                run.write()
            if profiled:
                run.phase(f"profile: {arm.name}", breakdown)

    found = run.results["engine"].setdefault(arm.name, {})
    run.phase(f"{'latency' if 'latency' in arguments.phases else 'profile'}: {arm.name}", measure)


def _many_documents(run: Run, arm: Arm, vocabulary: int, with_decode: bool) -> None:
    """The job, decode steps by batch (once for each precision: they do not depend on the prefill), busy share."""
    arguments = run.arguments
    wanted = {"busy"} | ({"decode", "lookup"} if with_decode else set())
    if arm.name in arguments.main_arms:
        wanted |= {"job", "questions"}
    order = ("job", "questions", "decode", "busy", "lookup")
    phases = [name for name in order if name in wanted and name in arguments.phases]
    if not phases:
        return
    new = arguments.new_tokens
    found = run.results["engine"].setdefault(arm.name, {})
    ends = sorted({min(arguments.lengths), max(arguments.lengths)}, reverse=True)
    busy = [min(arguments.lengths)] * 2
    engine: Engine

    def questions() -> dict[str, Any]:
        if not run.results.get("questions_agreement", {}).get("ok"):
            raise JobError("not timed: what requests write behind a shared prefix was not found to be right")
        return ask(engine, prompts_of(arguments, vocabulary), new)

    def measure() -> None:
        nonlocal engine
        with closing(Engine(arm.config)) as engine:
            found["about"], found["plan"] = engine.describe(), engine.plan().to_dict()
            warm_up(engine, vocabulary)
            units: dict[str, Callable[[], Any]] = {
                "job": lambda: job(engine, _job_lengths(arguments), new, vocabulary),
                "questions": questions,
                "decode": lambda: decode_by_batch(engine, ends, arguments.batches),
                "lookup": lambda: lookup(engine, ends, sorted({1, arguments.max_live}), new, vocabulary),
                "busy": lambda: gpu_busy(engine, busy, min(new, 24), vocabulary),
            }
            found[phases[0]] = units[phases[0]]()
            for name in phases[1:]:
                run.phase(f"{name}: {arm.name}", lambda name=name: found.update({name: units[name]()}))  # type: ignore[misc]

    run.phase(f"{phases[0]}: {arm.name}", measure)


def _errors(run: Run, config: EngineConfig, stem: StemConfig, vocabulary: int) -> None:
    arguments = run.arguments
    found: dict[str, Any] = {}

    def keep(model: str, tokens: int) -> Callable[[list[dict[str, Any]]], None]:
        def note(results: list[dict[str, Any]]) -> None:
            run.results["error"] = found
            found[model] = {"prompt_tokens": tokens, "against": "dense bf16", "variants": results}
            run.write()

        return note

    def trained() -> None:
        prompt = real_prompt(arguments.error_document)
        own = replace(config, model=str(MODEL), gpus=1, load_format="auto", max_context=None)
        measure_errors(own, prompt, stem, keep(MODEL.name, len(prompt)))

    def shape() -> None:
        (prompt,) = random_prompts([arguments.error_tokens], vocabulary)
        measure_errors(config, prompt, stem, keep(arguments.shape, len(prompt)))

    run.phase("error: trained model", trained)
    run.phase("error: random weights", shape)
