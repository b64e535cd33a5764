"""Runs the arms, one after the other, on the same prompts: outputs, times, and probabilities along dense's answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jobs.audit.known import Known, read_known
from jobs.audit.options import Arm, Options
from jobs.audit.sample import Sampled
from jobs.measurement import TIE
from pipeline.engine import Completion, Engine, EngineError, Request, SharedPrompt
from pipeline.engine.devices import release_memory
from pipeline.engine.model.loading import load_runner
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.probes.teacher_forcing import TeacherForcingEngine
from pipeline.engine.probes.timing import decode_step_ms
from pipeline.errors import JobError, one_line
from pipeline.results.columns import column
from stem_core.budget import prompt_budget

# Prompts timed for the crossover: runs of each length on a GPU after one that compiles, and on a CPU.
GPU_REPEATS, CPU_REPEATS = 2, 1
# Tokens behind the longest prompt that timing decode steps takes.
STEP_ROOM = 64


@dataclass(frozen=True)
class Likeness:
    """One document's probabilities under an arm, against the reference's (dense), along the reference's answer."""

    first_token_agrees: bool = column("whether dense and this arm put the same token first")
    first_token_kl: float = column("KL(dense || arm) of the first token's distribution", unit="nats")
    answer_kl: float = column("the same along dense's answer, reading it token by token: mean", unit="nats")
    token_agreement: float = column("share of those tokens where both put the same one first")
    compared_tokens: int = column("tokens of dense's answer that were read so", unit="tokens")


@dataclass(frozen=True)
class Point:
    """A prefill: prompt tokens, seconds to the first token, computed share of the blocks, whether Stem ran."""

    prompt_tokens: int
    seconds: float
    density: float
    sparse: bool


def counted(documents: int) -> str:
    """1 document, 4 documents."""
    return f"{documents:,} document{'s' * (documents != 1)}"


def point_of(prompt_tokens: int, done: Completion) -> Point:
    """The prefill of a prompt that ended well."""
    assert done.density is not None, "it started"
    return Point(prompt_tokens, done.prefill_seconds, done.density, done.attention == "stem")


@dataclass
class ArmRun:
    """What became of an arm. seconds: of all documents together, from the first add() to the last completion.

    repeated: seconds of the same work at two times (the reference: all of it; others: the prefill of the shortest
    document); their ratio says how steady the device's times are.
    step: (tokens, milliseconds) of a decode step of one document alone, as long as the longest. curve: timed prompts.
    known: rows of jobs.known, of documents whose answers are known.
    """

    arm: Arm
    about: dict[str, Any]
    plan: dict[str, Any]
    load_seconds: float
    completions: dict[str, Completion]
    seconds: float
    likeness: dict[str, Likeness] = field(default_factory=dict)
    repeated: tuple[float, float] | None = None
    step: tuple[int, float] | None = None
    known: list[dict[str, Any]] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)

    @property
    def documents_per_hour(self) -> float:
        """Of those that ended well."""
        return 3600 * sum(done.status == "ok" for done in self.completions.values()) / self.seconds


@dataclass
class Reference:
    """What the others are compared with: dense outputs, and log-probabilities along them, float32 [tokens, V].

    seconds: of the run that wrote the outputs, which is not the one that is reported.
    """

    outputs: dict[str, list[int]]
    seconds: float = 0.0
    log_probs: dict[str, Tensor] = field(default_factory=dict)


class Clock:
    """Says on stderr how far the audit is."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def say(self, text: str) -> None:
        """One line, with the seconds since the start."""
        print(f"[{time.perf_counter() - self._begin:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass
class Measured:
    """runs: of the arms, the reference's first. refused: arms that this model or device cannot run, and why."""

    runs: list[ArmRun]
    reference: Reference
    refused: list[tuple[str, str]]


def measure(options: Options, documents: Sequence[Sampled], known: Known, clock: Clock) -> Measured:
    """All arms on `documents`, longest first, and on those whose answers are known.

    Raises JobError if the reference cannot run, or for what was measured and cannot be right.
    """
    longest = len(documents[0].prompt) + max(options.job.max_new_tokens, STEP_ROOM)
    runner: ModelRunner | None = None
    loaded = ""
    reference: Reference | None = None
    runs: list[ArmRun] = []
    refused: list[tuple[str, str]] = []
    for arm in options.arms:
        arm = replace(arm, config=replace(arm.config, max_context=min(options.context, longest)))
        begin = time.perf_counter()
        try:
            if runner is None or loaded != arm.precision:
                runner = None
                release_memory(arm.config.torch_device())
                clock.say(f"loading {options.job.model} in {arm.precision}")
                runner, loaded = load_runner(arm.config), arm.precision
            engine = TeacherForcingEngine(arm.config, runner)
        except EngineError as error:
            if reference is None:
                raise
            clock.say(f"{arm.name}: {error}")
            refused.append((arm.name, one_line(error)))
            continue
        load_seconds = time.perf_counter() - begin
        try:
            if reference is None:
                clock.say(f"{arm.name}: {counted(len(documents))}, for the outputs that all others are compared with")
                if arm.config.torch_device().type == "cuda":
                    _warm_up(engine, options, documents[-1])
                reference = _first_outputs(engine, options, documents)
            run = _measure_arm(engine, arm, options, documents, reference, load_seconds, clock)
        finally:
            engine.close()
            del engine
        if known.readings:
            clock.say(f"{arm.name}: {counted(len(known.readings))} with known answers")
            run.known = read_known(known, runner, arm)
            release_memory(arm.config.torch_device())
        runs.append(run)
    assert reference is not None, "there is a dense arm"
    return Measured(runs, reference, refused)


def _first_outputs(engine: Engine, options: Options, documents: Sequence[Sampled]) -> Reference:
    seconds, done = run_documents(engine, prompts_of(documents, options))
    ok = {name: completion for name, completion in done.items() if completion.status == "ok"}
    if not ok:
        first = next(iter(done.values()))
        raise JobError(f"dense attention finished none of the documents; {first.request_id}: {first.error}")
    return Reference({name: completion.token_ids for name, completion in ok.items()}, seconds)


def _measure_arm(
    engine: TeacherForcingEngine, arm: Arm, options: Options, documents: Sequence[Sampled], reference: Reference,
    load_seconds: float, clock: Clock,
) -> ArmRun:  # fmt: skip
    is_reference = not reference.log_probs
    clock.say(f"{arm.name}: {counted(len(documents))}, timed")
    likeness: dict[str, Likeness] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        def keep(log_probs: Tensor) -> None:
            if is_reference:
                reference.log_probs[name] = log_probs.cpu()
            else:
                likeness[name] = likeness_of(log_probs, reference.log_probs[name].to(log_probs.device))

        return keep

    warm = _warm_up(engine, options, documents[-1]) if not is_reference else None
    for name, token_ids in reference.outputs.items():
        engine.expect(name, token_ids[: options.kl_tokens], note(name))
    seconds, done = run_documents(engine, prompts_of(documents, options))
    run = ArmRun(arm, engine.describe(), engine.plan().to_dict(), load_seconds, done, seconds - engine.forcing_seconds)
    run.likeness = likeness
    if is_reference:
        check_reference(reference, done, arm.precision)
        run.repeated = reference.seconds, run.seconds
    elif warm is not None:
        again = done[documents[-1].document_id]
        _check_warm(warm, again, arm)
        if warm.status == again.status == "ok":
            run.repeated = warm.prefill_seconds, again.prefill_seconds
    longest = len(documents[0].prompt)
    step = decode_step_ms(engine, [longest])
    run.step = None if step is None else (longest, step)
    run.curve = _curve(engine, arm, options, documents)
    return run


def prompts_of(documents: Sequence[Sampled], options: Options, most: int | None = None) -> list[SharedPrompt]:
    """Greedy requests, each read behind its document as a job reads it. Random weights end no output before its limit.

    most: tokens of an output, if not as many as in the job.
    """
    most, stops = most or options.job.max_new_tokens, options.stop_ids
    return [
        SharedPrompt(
            document.prompt[: document.prefix_tokens],
            (Request(document.document_id, document.prompt[document.prefix_tokens :], most, stop_ids=stops),),
        )
        for document in documents
    ]


def run_documents(engine: Engine, prompts: Sequence[SharedPrompt]) -> tuple[float, dict[str, Completion]]:
    """All at once: seconds from the first add_shared() to the last completion, and the completions by id."""
    begin = time.perf_counter()
    for prompt in prompts:
        engine.add_shared(prompt)
    done: dict[str, Completion] = {}
    while engine.has_work:
        done.update((completion.request_id, completion) for completion in engine.step())
    names = [request.request_id for prompt in prompts for request in prompt.requests]
    return time.perf_counter() - begin, {name: done[name] for name in names}


def likeness_of(log_probs: Tensor, reference: Tensor) -> Likeness:
    """Of one document: log-probabilities float [tokens, V] of an arm and of the reference."""
    p = reference.exp()
    # A token that the model excludes has log-probability -inf on both sides.
    divergence = torch.where(p > 0, p * (reference - log_probs), 0.0).sum(-1).clamp(min=0)
    same = log_probs.argmax(-1) == reference.argmax(-1)
    return Likeness(
        first_token_kl=float(divergence[0]),
        first_token_agrees=bool(same[0]),
        answer_kl=float(divergence.mean()),
        token_agreement=float(same.float().mean()),
        compared_tokens=len(same),
    )


def check_reference(reference: Reference, again: dict[str, Completion], precision: str) -> None:
    """Raise JobError unless dense wrote the same tokens twice, and puts them first when it reads them, ties apart.

    In low precision two right computations part where two tokens are almost equally likely.
    """
    tie = TIE.get(precision, TIE["bf16"])
    for name, written in reference.outputs.items():
        second, rows = again[name], reference.log_probs.get(name)
        if second.status != "ok" or rows is None:
            raise JobError(f"dense attention finished {name} once, and then not: {second.status}: {second.error}")
        common = same_tokens(written, second.token_ids)
        gap = 0.0
        if written != second.token_ids and common < min(len(rows), len(written), len(second.token_ids)):
            gap = abs(float(rows[common, written[common]] - rows[common, second.token_ids[common]]))
        chosen = rows.gather(1, torch.tensor(written[: len(rows)])[:, None])[:, 0]
        gap = max(gap, float((rows.amax(-1) - chosen).max()))
        if gap > tie:
            raise JobError(
                f"dense attention in {precision} does not write the same tokens for {name} twice (log-probabilities "
                f"differ by {gap:.3g}, {tie:g} can be rounding): something is wrong here, so nothing is reported"
            )


def same_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two outputs have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _warm_up(engine: Engine, options: Options, document: Sampled) -> Completion:
    """The document's prefill and first token; on a GPU the second time, when nothing is compiled any more."""
    prompts = prompts_of([document], options, most=1)
    for _ in range(2 if engine.config.torch_device().type == "cuda" else 1):
        _, done = run_documents(engine, prompts)
    return done[document.document_id]


def _check_warm(warm: Completion, timed: Completion, arm: Arm) -> None:
    if warm.status == timed.status == "ok" and warm.token_ids != timed.token_ids[:1]:
        raise JobError(
            f"{arm.name} began its answer to {timed.request_id} with another token the second time "
            f"({warm.token_ids} and {timed.token_ids[:1]}): something is wrong here, so nothing is reported"
        )


def _curve(engine: Engine, arm: Arm, options: Options, documents: Sequence[Sampled]) -> list[Point]:
    """Beginnings of the longest prompt, prefilled alone; those on which Stem would run dense only under dense."""
    prompt = documents[0].prompt
    on_gpu = arm.config.torch_device().type == "cuda"
    points = []
    for length in [n for n in options.lengths if n <= len(prompt)]:
        if not arm.dense and prompt_budget(length, arm.config.attention).budgets is None:
            continue
        beginning = SharedPrompt(prompt[:length], (Request("curve", prompt[:1], 1),))  # asked anything
        runs = [
            run_documents(engine, [beginning])[1]["curve"] for _ in range(GPU_REPEATS + 1 if on_gpu else CPU_REPEATS)
        ]
        timed = [run for run in (runs[1:] if on_gpu else runs) if run.status == "ok"]
        if timed:
            best = min(timed, key=lambda run: run.prefill_seconds)
            points.append(point_of(length, best))
    return points
