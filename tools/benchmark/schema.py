"""Answers by a schema: are they all valid, and what does a decode step cost more?

First so many answers of a real model to made-up reports, through the pipeline in this process: each must be ok, its
struct valid by the schema. Then decode steps of the engine, the same prompts and rows live in all arms: none of them
with a schema, one, all. The time is that of steps back to back, from when all rows are live to the first one's end; the
arms take turns. Nothing is reported if an answer is wrong, or a row of the timed steps leaves its grammar.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from jobs.measurement import stamp
from pipeline.answers.schema import compile_schema
from pipeline.api import Summarizer
from pipeline.engine import Completion, Engine, EngineConfig, Request
from pipeline.errors import JobError
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.tokens import load_tokens
from pipeline.settings.shared import PRECISIONS
from tools.benchmark._measure import table, write_json

QUESTION = "Give the plant, what failed, the hours of standstill, the cost in euros, who repaired it, and the date."
NAME = {"type": "string", "maxLength": 40}
REPORT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "plant": NAME,
        "fault": {"enum": ["pump", "valve", "bearing", "power", "other"]},
        "hours": {"type": "integer", "minimum": 0, "maximum": 10_000},
        "cost": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 10_000_000}, {"type": "null"}]},
        "people": {"type": "array", "items": NAME, "maxItems": 4},
        "date": {"type": "string", "format": "date"},
    },
    "required": ["plant", "fault", "hours", "cost", "people", "date"],
}
# No answer by it ends while steps are timed.
ENDLESS = {"type": "array", "items": REPORT, "minItems": 200}
PLANTS = ("Aachen", "Bremen", "Celle", "Dresden", "Essen", "Fulda", "Gera")
FAULTS = ("a pump failed", "a valve froze", "a bearing overheated", "the power was cut")
ARMS = ("none", "one", "all")
TARGET = 1.05
WARM_UP = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--model", required=True, help="a real, small model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--answers", type=int, default=1000, help="answers that must be valid (1000)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="of those (160)")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], metavar="N", help="live documents (8 16)")
    parser.add_argument("--sentences", type=int, default=200, help="length of the documents of the timed steps (200)")
    parser.add_argument("--steps", type=int, default=200, help="decode steps that are timed, at most (200)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", help="write the figures to this JSON file")


def main(options: argparse.Namespace) -> int:
    """Run it; 0 if a step with schemas takes at most 5% longer, 2 if not. Raises JobError for a wrong answer."""
    valid = answers(options)
    print(f"{valid['answers']} answers, all valid; {valid['different']} different ones, in {valid['seconds']:.1f} s")
    rows = [each for count in options.rows for each in step_times(options, count)]
    print(table(rows, {"rows": "d", "schemas": "", "step_ms": ".3f", "ratio": ".3f", "steps": "d"}))
    if options.output:
        device = EngineConfig(options.model, device=options.device).torch_device()
        write_json(Path(options.output), {**stamp(device, options.commit), "valid": valid, "steps": rows})
    return 0 if max(each["ratio"] for each in rows) <= TARGET else 2


def report(number: int, sentences: int = 0) -> str:
    """A made-up report with answers that are known, filled up with sentences that say nothing."""
    filler = "The quiet committee reviewed the harbour budget in the spring. " * sentences
    return (
        f"{filler}On {1 + number % 28} March {2005 + number % 20}, {FAULTS[number % 4]} at the plant of "
        f"{PLANTS[number % 7]}. The line stood still for {3 + number % 90} hours. Ada Lang and Tom Berg repaired it. "
        f"The cost was {1200 + 37 * number} euros."
    )


def answers(options: argparse.Namespace) -> dict[str, Any]:
    """Answers to so many reports. Raises JobError if one is not ok, or not valid."""
    schema = compile_schema(REPORT)
    documents = {f"r{number:05}": report(number) for number in range(options.answers)}
    settings = {"precision": options.precision, "device": options.device, "max_new_tokens": options.max_new_tokens}
    with Summarizer(model=options.model, question=QUESTION, schema=REPORT, max_live=32, **settings) as summarizer:
        summarizer.load()
        begin = time.perf_counter()
        rows = summarizer(documents).to_pylist()
        seconds = time.perf_counter() - begin
    wrong = [row for row in rows if row["status"] != "ok" or schema.parse(row["output"]) != row["answer"]]
    if wrong:
        first = wrong[0]
        raise JobError(f"{len(wrong)} of {len(rows)} answers are wrong; {first['document_id']}: {first['error']}")
    return {"answers": len(rows), "different": len({row["output"] for row in rows}), "seconds": seconds}


def step_times(options: argparse.Namespace, rows: int) -> list[dict[str, Any]]:
    """A row for each of ARMS: milliseconds of a decode step, and as a multiple of that without schemas."""
    tokens = load_tokens(options.model)
    grammar = compile_schema(ENDLESS).grammar(tokens.tokenizer, tokens.eos_ids)
    builder = PromptBuilder(tokens, make_task("ask", QUESTION, None))
    prompts = [builder.build(report(number, options.sentences), 1 << 40).ids for number in range(rows)]
    new = options.steps + WARM_UP + rows + 8
    engine = Engine(
        EngineConfig(
            options.model, device=options.device, precision=options.precision, max_live=rows, grammars=True,
            prompt_lookup="off",  # steps with drafts give more tokens, and are other steps
            arena_tokens=sum(len(ids) + new + 256 for ids in prompts),
        )
    )  # fmt: skip
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    steps: dict[str, int] = {}
    try:
        for repeat in range(options.repeats + 1):
            for arm in ARMS:
                held = {"none": 0, "one": 1, "all": rows}[arm]
                asked = [
                    Request(f"{repeat}-{arm}-{row}", ids, new, grammar=grammar if row < held else None)
                    for row, ids in enumerate(prompts)
                ]
                took, steps[arm] = _timed(engine, asked, options.steps)
                if repeat:  # the first round compiles
                    times[arm].append(1000 * took / steps[arm])
    finally:
        engine.close()
    medians = {arm: statistics.median(found) for arm, found in times.items()}
    return [
        {
            "rows": rows, "schemas": arm, "step_ms": medians[arm], "ratio": medians[arm] / medians["none"],
            "steps": steps[arm],
        }
        for arm in ARMS
    ]  # fmt: skip


def _timed(engine: Engine, requests: list[Request], most: int) -> tuple[float, int]:
    """Seconds of decode steps with all requests live, and how many steps. Raises JobError if there are too few."""
    for request in requests:
        engine.add(request)
    while engine.live < len(requests):
        if engine.step():
            raise JobError("a document ended before all were live: ask for more --steps, or fewer --rows")
    for _ in range(WARM_UP):
        engine.step()
    _synchronize()
    begin, count = time.perf_counter(), 0
    ended: list[Completion] = []
    while count < most and not ended:
        ended = engine.step()
        count += 1
    _synchronize()
    took = time.perf_counter() - begin
    wrong = [done for done in ended if done.status != "ok"]
    for request in requests:
        engine.abort(request.request_id)
    if wrong or count < 20:
        why = wrong[0].error if wrong else f"a document ended after {count} steps"
        raise JobError(f"decode steps cannot be timed: {why}")
    return took, count


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
