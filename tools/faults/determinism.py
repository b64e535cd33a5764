"""How many documents have the same output in company as alone, token for token: python -m tools.faults determinism

Half of the prompts are texts from examples/documents, half (all, for a model without a tokenizer) are random tokens,
whose next tokens are near-ties: the hard case. Every document is there twice, greedy and with seeded sampling. The
outputs that the others are compared with are those of each document alone in the engine.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine.config import EngineConfig, Request, Sampling
from pipeline.errors import JobError
from pipeline.imports import ROOT
from stem_core.config import StemConfig
from tools.faults.corpus import READER
from tools.shapes import ALIASES, SHAPES, shape_folder

SAMPLINGS = {"greedy": Sampling(), "seeded": Sampling(temperature=0.8, top_p=0.95, seed=5)}
# Every layer sparse, in blocks small enough for prompts of a few thousand tokens.
SPARSE = StemConfig.preset("release", block_size=64, dense_layers=0, dense_below=0)
ATTENTIONS = {"dense": None, "stem": SPARSE}
MAX_LIVE, FEWER_LIVE = 8, 3
SHORTEST = 300
QUESTION = "List the key findings in order."

Outputs = dict[str, list[int]]


@dataclass(frozen=True)
class Variation:
    """A way to run the same requests. seed: of their order, None keeps it. chunk: 1/chunk of the prefill steps."""

    name: str
    max_live: int = MAX_LIVE
    alone: bool = False
    seed: int | None = None
    chunk: int = 1
    full_width: bool = False


ALONE = Variation("alone", alone=True)
VARIATIONS = (
    Variation("alone, once more", alone=True),
    Variation(f"together, {MAX_LIVE} at a time"),
    Variation(f"together, {MAX_LIVE} at a time, in another order", seed=1),
    Variation("alone, prefill steps of a quarter", alone=True, chunk=4),
    Variation(f"together, {FEWER_LIVE} at a time, in another order, steps of a quarter", FEWER_LIVE, seed=2, chunk=4),
)
# Decode steps that always run all rows: the GEMMs then have one shape, whoever is there.
FULL_WIDTH_ALONE = Variation("full-width steps, alone", alone=True, full_width=True)
FULL_WIDTH = Variation(
    f"full-width steps, together, {MAX_LIVE} at a time, in another order, against alone in such steps",
    seed=3,
    full_width=True,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32", "fp8"))
    parser.add_argument("--model", default=str(READER), help="model folder (default: the bundled one)")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    parser.add_argument("--shape", help=f"instead of --model: {', '.join((*SHAPES, *ALIASES))}, with random weights")
    parser.add_argument("--attention", nargs="+", choices=tuple(ATTENTIONS), default=list(ATTENTIONS))
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--longest", type=int, default=4000, help="tokens in the longest prompt")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=600.0, help="start nothing more after so many")


@dataclass(frozen=True)
class Share:
    """How a variation compares. parted: places of the first tokens that differ."""

    variation: str
    attention: str
    sampling: str
    same: int
    documents: int
    parted: tuple[int, ...]
    seconds: float


def main(options: argparse.Namespace) -> int:
    """Run all variations and print the shares; 0."""
    from pipeline.engine.model.loading import load_runner

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        dummy = options.shape is not None or options.load_format == "dummy"
        model = str(shape_folder(options.shape, Path(scratch) / "shape")) if options.shape else options.model
        config = EngineConfig(
            model,
            device=options.device,
            precision=options.precision,
            load_format="dummy" if dummy else "auto",
            chunk_tokens=options.chunk_tokens,
            arena_tokens=MAX_LIVE * (options.longest + options.new_tokens + 64),
            max_context=options.longest + options.new_tokens,
        )
        prompts = make_prompts(model, options.documents, options.longest, texts=not dummy)
        print(
            f"{len(prompts)} documents of {min(map(len, prompts.values())):,} to {max(map(len, prompts.values())):,} "
            f"tokens, {options.new_tokens} new tokens at most, {options.shape or model} on {options.device}",
            flush=True,
        )
        runner, shares = load_runner(config), []
        for name in options.attention:
            attending = replace(config, attention=ATTENTIONS[name])
            for share in compare(attending, prompts, options.new_tokens, begun + options.seconds, runner):
                shares.append(replace(share, attention=name))
                print(line(shares[-1]), flush=True)
    print(f"\n{markdown(shares)}\n\n{time.monotonic() - begun:.0f} s")
    return 0


def make_prompts(model: str, documents: int, longest: int, texts: bool) -> dict[str, np.ndarray]:
    """Token ids by document, of SHORTEST to `longest` tokens. Raises JobError for a model that cannot be read."""
    from pipeline.engine.model.loading import load_config

    if documents < 1 or longest < SHORTEST:
        raise JobError(f"--documents and --longest: at least 1 and {SHORTEST}, got {documents} and {longest}")
    lengths = np.linspace(SHORTEST, longest, documents).astype(int)
    vocabulary = load_config(EngineConfig(model)).get_text_config().vocab_size
    prompts: dict[str, np.ndarray] = {}
    for index, length in enumerate(lengths):
        if texts and index % 2:
            prompts[f"text-{index}"] = text_prompt(model, index, int(length))
        else:
            prompts[f"random-{index}"] = np.random.default_rng(index).integers(5, vocabulary, int(length))
    return prompts


def text_prompt(model: str, index: int, tokens: int) -> np.ndarray:
    """A piece of an example document behind the model's chat template, at most `tokens` tokens."""
    from pipeline.prompts.prompt import PromptBuilder
    from pipeline.prompts.task import make_task
    from pipeline.prompts.tokens import load_tokens

    builder = PromptBuilder(load_tokens(model), make_task("summarize", QUESTION, None))
    files = sorted((ROOT / "examples" / "documents").glob("*.txt"))
    text = files[index % len(files)].read_text()
    return np.asarray(builder.build(text, tokens, truncate=True).ids)


def compare(
    config: EngineConfig, prompts: dict[str, np.ndarray], new_tokens: int, until: float, runner: Any = None
) -> Iterator[Share]:
    """The shares of all variations against ALONE, in as few engines as they need, until `until` (time.monotonic).

    runner: as for Engine.
    """
    from pipeline.engine import Engine

    requests = make_requests(prompts, new_tokens)
    references: dict[bool, Outputs] = {}
    variations = [ALONE, *VARIATIONS, FULL_WIDTH_ALONE, FULL_WIDTH]
    for max_live in (MAX_LIVE, FEWER_LIVE):
        wanted = [variation for variation in variations if variation.max_live == max_live]
        engine = None
        for variation in wanted:
            if time.monotonic() > until:
                print(f"out of time: {variation.name}", flush=True)
                continue
            engine = engine or Engine(replace(config, max_live=max_live), runner)
            begun = time.monotonic()
            outputs = generate(engine, requests, variation)
            seconds = time.monotonic() - begun
            if variation == ALONE:
                references[False] = outputs
                print(f"{variation.name}: {seconds:.1f} s", flush=True)
                continue
            full = variation == FULL_WIDTH
            yield from count_same(variation, references[full], outputs, seconds)
            if variation == FULL_WIDTH_ALONE:  # what full-width steps in company are compared with
                references[True] = outputs
        if engine is not None:
            engine.close()


def make_requests(prompts: dict[str, np.ndarray], new_tokens: int) -> list[Request]:
    """Each prompt greedy and sampled."""
    return [
        Request(f"{name} {kind}", ids, new_tokens, sampling)
        for name, ids in prompts.items()
        for kind, sampling in SAMPLINGS.items()
    ]


def generate(engine: Any, requests: Sequence[Request], variation: Variation) -> Outputs:
    """Token ids by request. Raises JobError if one ends without an output."""
    order = list(requests)
    if variation.seed is not None:
        random.Random(variation.seed).shuffle(order)
    if variation.chunk > 1:
        order = [replace(each, chunk_tokens=engine.config.chunk_tokens // variation.chunk) for each in order]
    done: Outputs = {}
    with full_width() if variation.full_width else _as_it_is():
        for batch in [[each] for each in order] if variation.alone else [order]:
            for each in batch:
                engine.add(each)
            while engine.has_work:
                for completion in engine.step():
                    if completion.status != "ok":
                        raise JobError(f"{completion.request_id}: {completion.status}: {completion.error}")
                    done[completion.request_id] = completion.token_ids
    return done


@contextmanager
def full_width() -> Iterator[None]:
    """Inside, every decode step runs all rows of its batch."""
    from pipeline.engine import engine

    bucket = engine.batch_bucket
    engine.batch_bucket = lambda rows, max_rows: max_rows
    try:
        yield
    finally:
        engine.batch_bucket = bucket


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def count_same(variation: Variation, reference: Outputs, outputs: Outputs, seconds: float) -> Iterator[Share]:
    """The shares of a variation, by sampling."""
    for kind in SAMPLINGS:
        names = [name for name in reference if name.endswith(f" {kind}")]
        places = [first_difference(reference[name], outputs[name]) for name in names]
        parted = tuple(sorted(place for place in places if place is not None))
        yield Share(variation.name, "", kind, len(names) - len(parted), len(names), parted, seconds)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two outputs differ, or None."""
    pairs = enumerate(zip(one, other, strict=False))
    shorter = min(len(one), len(other))
    return next((i for i, (a, b) in pairs if a != b), None if len(one) == len(other) else shorter)


def line(share: Share) -> str:
    """A share for a person."""
    where = f", the others part at tokens {list(share.parted)}" if share.parted else ""
    return (
        f"{share.attention} {share.sampling}, {share.variation}: {share.same} of {share.documents} the same"
        f"{where} ({share.seconds:.1f} s)"
    )


def markdown(shares: Sequence[Share]) -> str:
    """Variations against attention and sampling."""
    columns = list(dict.fromkeys((share.attention, share.sampling) for share in shares))
    found = {(share.variation, share.attention, share.sampling): share for share in shares}
    heads = " | ".join(" ".join(column) for column in columns)
    lines = [f"| the same output as alone | {heads} |", "|---" * (len(columns) + 1) + "|"]
    for variation in dict.fromkeys(share.variation for share in shares):
        each = [found.get((variation, *column)) for column in columns]
        cells = [f"{share.same} of {share.documents}" if share else "" for share in each]
        lines.append(f"| {variation} | {' | '.join(cells)} |")
    return "\n".join(lines)
