"""Prompt lookup on a real model and a real text: the seconds of decoding that drafts save, and whether outputs stay.

Stretches of the text are the documents, each asked for a summary and for an extraction that quotes. The same prompts
are read and continued twice, one token a step and with drafts while they pay, by the policy that jobs have. Decoding is
the time of the run without its prefill. On a GPU rounding differs between steps of one and of several tokens, so that
near-ties fall the other way: outputs that part are counted, and the model is asked again how much likelier it finds the
one token than the other where they part.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.measurement import stamp
from pipeline.engine import EngineConfig, Request
from pipeline.engine.probes.teacher_forcing import TeacherForcingEngine
from pipeline.errors import JobError
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.tokens import Tokens, load_tokens
from pipeline.settings.shared import PRECISIONS
from tools.benchmark._measure import table, write_json
from tools.benchmark.engine.phases import run_documents

ASKED = {
    "summary": None,  # the question that jobs.summarize asks
    "extraction": "List the people, places and dates of the text above. Behind each, quote word for word the sentence "
    "that names it.",
}
SETTINGS = ("off", "auto")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--model", required=True, help="a real model")
    parser.add_argument("--text", required=True, help="a long text in UTF-8, cut into the documents")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--tokens", type=int, default=8000, help="of a document (8000)")
    parser.add_argument("--documents", type=int, default=16, help="of each question (16)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="live documents (1 8)")
    parser.add_argument("--new-tokens", type=int, default=256, help="at most, of an output (256)")
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", help="write the figures and the outputs to this JSON file")


def main(options: argparse.Namespace) -> int:
    """Measure and print; 0. Raises JobError for a text that is too short, or a document that does not end well."""
    tokens = load_tokens(options.model)
    texts = stretches(tokens, Path(options.text).read_text(encoding="utf-8"), options.tokens, options.documents)
    asked = {}
    for name, question in ASKED.items():
        builder = PromptBuilder(tokens, make_task("summarize" if question is None else "ask", question, None))
        asked[name] = [builder.build(text, 1 << 40).ids for text in texts]
    room = max(len(ids) for prompts in asked.values() for ids in prompts) + options.new_tokens + 256
    rows, outputs, runner = [], [], None
    for live in options.rows:
        config = EngineConfig(
            options.model, device=options.device, precision=options.precision, max_live=live, arena_tokens=live * room,
            prompt_lookup="auto",
        )  # fmt: skip
        engine = TeacherForcingEngine(config, runner)
        runner = engine._runner
        for name, prompts in asked.items():
            row, written = compare(engine, prompts, live, options.new_tokens)
            rows.append({"live": live, "asked": name, **row})
            outputs.append({"live": live, "asked": name, **written})
        engine.close()
    shown = {
        "live": "d", "asked": "", "off_seconds": ".2f", "auto_seconds": ".2f", "gain": ".2f", "tokens_per_step": ".2f",
        "parted": "d", "parted_per_1000_tokens": ".2f", "largest_margin": ".3f",
    }  # fmt: skip
    print(table(rows, shown))
    if options.output:
        device = EngineConfig(options.model, device=options.device).torch_device()
        texts_of = [
            {**each, **{setting: [tokens.tokenizer.decode(ids) for ids in each[setting]] for setting in SETTINGS}}
            for each in outputs
        ]
        write_json(Path(options.output), {**stamp(device, options.commit), "rows": rows, "outputs": texts_of})
    return 0


def stretches(tokens: Tokens, text: str, length: int, count: int) -> list[str]:
    """So many consecutive parts of a text, of so many tokens each. Raises JobError if it is too short."""
    ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < length * count:
        raise JobError(
            f"--text has {len(ids):,} tokens; {count} documents of {length:,} take {length * count:,}: give a longer "
            "text, or fewer --documents or --tokens"
        )
    return [tokens.tokenizer.decode(ids[length * i : length * (i + 1)]) for i in range(count)]


def compare(
    engine: TeacherForcingEngine, prompts: list[np.ndarray], live: int, new_tokens: int
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Seconds of decoding in each of SETTINGS, and what parts their outputs; the outputs themselves."""
    policy = engine._lookup
    seconds: dict[str, float] = {}
    outputs: dict[str, list[list[int]]] = {}
    steps: list[float] = []
    for setting in SETTINGS:
        engine._lookup = policy if setting == "auto" else None
        run_documents(engine, prompts, new_tokens)  # compiles, and captures steps of all numbers of rows
        took, done = run_documents(engine, prompts, new_tokens)
        seconds[setting] = took - sum(completion.prefill_seconds for completion in done)
        outputs[setting] = [completion.token_ids for completion in done]
        steps = [completion.tokens_per_step for completion in done if completion.tokens_per_step is not None]
    margins = margins_where_parted(engine, prompts, outputs["off"], outputs["auto"])
    written = sum(map(len, outputs["off"]))
    row = {
        "off_seconds": seconds["off"],
        "auto_seconds": seconds["auto"],
        "gain": seconds["off"] / seconds["auto"],
        "tokens_per_step": sum(steps) / max(1, len(steps)),
        "written_tokens": written,
        "parted": len(margins),
        "parted_per_1000_tokens": 1000 * len(margins) / max(1, written),
        "margins": margins,
        "largest_margin": max(map(abs, margins), default=None),
    }
    return row, outputs


def margins_where_parted(
    engine: TeacherForcingEngine, prompts: list[np.ndarray], first: list[list[int]], second: list[list[int]]
) -> list[float]:
    """Of each pair of outputs that differ: how much more log-probability (nats) the model gives the first one's token,
    where they part.

    Raises JobError for a document that does not end well: its margin would be missing.
    """
    margins: list[float] = []
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        at = next((place for place, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), None)
        if at is None:
            continue

        def note(log_probs: torch.Tensor, one: int = one[at], other: int = other[at]) -> None:
            margins.append(float(log_probs[-1, one] - log_probs[-1, other]))

        engine.expect(str(i), one[: at + 1], note)
        engine.add(Request(str(i), prompts[i], at + 1))
    while engine.has_work:
        for done in engine.step():
            if done.status != "ok":
                raise JobError(f"document {done.request_id}, read again, ended with {done.status}: {done.error}")
    return margins
