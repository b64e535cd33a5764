"""One evaluation: documents are made, read under every arm, and written as rows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from jobs.evaluate.answers import Answer
from jobs.evaluate.arms import FEWEST_BLOCKS, Arm, make_arms
from jobs.evaluate.attention import prepare_model
from jobs.evaluate.engine_reader import EngineReader, engine_arms, engine_config
from jobs.evaluate.options import Options
from jobs.evaluate.prompts import Tokenizer, make_document, read_prompts
from jobs.evaluate.reader import Reader
from jobs.evaluate.results import Row, row_of, write_rows
from jobs.evaluate.wording import Style, pick_style
from pipeline.engine.model.loading import load_model, stop_token_ids
from pipeline.errors import JobError
from stem_core.patch import UnsupportedModelError

# Keys and values that are held at once on a CPU, and the share of a GPU's free memory for them.
CPU_CACHE_BYTES = 2 << 30
GPU_CACHE_SHARE = 0.5
# Arms whose answers are decoded as one batch, where the cache has room.
MOST_ARMS = 4


def cached_tokens(model: nn.Module, device: torch.device, gib: float | None) -> int:
    """Tokens whose keys and values may be held in float32, for decoding, at the same time; in `gib` GiB if given."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 2 * text.num_hidden_layers * heads * width * 4
    if gib is not None:
        return int(gib * 2**30 // size)
    room = CPU_CACHE_BYTES if device.type == "cpu" else int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(room // size)


def load(options: Options) -> nn.Module:
    """The model with the evaluation's attention. Raises JobError."""
    model = load_model(engine_config(options, options.precision))
    try:
        return prepare_model(model)
    except UnsupportedModelError as error:
        raise JobError(f"--model {options.model}: {error}") from None


def own_reader(options: Options) -> Reader:
    """The reader that looks inside. Raises JobError."""
    model = load(options)
    cached = cached_tokens(model, options.device, options.cache_gib)
    return Reader(model, stop_token_ids(model), options.chunk_tokens, cached)


def describe(options: Options, style: Style, arms: dict[int, list[Arm]]) -> list[str]:
    """What will run, in lines for the person who waits for it."""
    lines = [
        f"{options.model} on {options.device}, questions worded as in {style.name}; kinds of documents: "
        f"{', '.join(options.kinds)}; {options.documents} of each a length, {options.questions} questions of a kind"
    ]
    if options.engine:
        lines.append(
            f"read by the product's engine in {', '.join(options.engine)}: every question is a prompt of its own, a "
            "lookup one that ends before the value's second mention"
        )
    for length in options.lengths:
        sizes = options.block_sizes_for(length)
        blocks = ", ".join(f"B = {size} ({-(-length // size)} blocks)" for size in sizes)
        why = "as asked" if options.block_sizes else f"the largest B that gives at least {FEWEST_BLOCKS} blocks"
        if not options.block_sizes and length // sizes[0] < FEWEST_BLOCKS:
            why = "the smallest B"
        lines.append(f"{length:,} tokens: {blocks}, {why}; {len(arms[length])} arms:")
        lines += [f"  {_describe_arm(arm, length)}" for arm in arms[length]]
    return lines


def _describe_arm(arm: Arm, length: int) -> str:
    if arm.config is None:
        return arm.name
    density = arm.density(length, arm.config.dense_layers + 1)[0]
    few = "; dense at this length" if density == 1.0 else ""
    return f"{arm.name} B={arm.block_size} tail={arm.config.dense_tail} density {density:.3f}{few}"


def run(options: Options) -> dict[str, Any]:
    """Write options.output/rows/*.parquet as it goes. Returns facts about the run. Raises JobError."""
    begun = time.monotonic()
    tokenizer = Tokenizer(options.tokenizer, options.revision)
    style = pick_style(options.style, tokenizer.vocabulary)
    arms = {
        length: make_arms(
            options.arms,
            options.block_sizes_for(length),
            options.densities,
            options.dense_tails,
            options.dense_layers,
        )
        for length in options.lengths
    }
    if options.engine:
        arms = {length: engine_arms(each, options.engine) for length, each in arms.items()}
    print("\n".join(describe(options, style, arms)), flush=True)
    reader = EngineReader(options) if options.engine else own_reader(options)
    if max(options.lengths) > reader.limit:
        raise JobError(f"--lengths {max(options.lengths)}: {options.model} takes up to {reader.limit} tokens")
    folder = options.output / "rows"
    if folder.exists():
        shutil.rmtree(folder)  # an evaluation is one run; several are put together by --report
    cells = [(length, kind) for length in options.lengths for kind in options.kinds]
    part, stopped = 0, ""
    for length, kind in cells:
        for rows in _run_cell(options, style, tokenizer, reader, arms[length], kind, length):
            write_rows(rows, folder, part)
            part += 1
            seconds = time.monotonic() - begun
            if seconds > options.time_limit:
                stopped = f"stopped by --time-limit in {kind}, {length} tokens"
                break
        print(f"  {length:,} tokens, {kind}: {time.monotonic() - begun:.0f} s since the start", flush=True)
        if stopped:
            print(stopped, flush=True)
            break
    return {
        "style": style.name,
        "seconds": time.monotonic() - begun,
        "stopped": stopped,
        "layers": reader.layers,
    }


def _run_cell(
    options: Options,
    style: Style,
    tokenizer: Tokenizer,
    reader: Reader | EngineReader,
    arms: list[Arm],
    kind: str,
    length: int,
) -> Iterator[list[Row]]:
    """All documents of one kind and length: the rows of dense, then of the other arms, a few at a time."""
    readings = []
    for index in range(options.documents):
        made = make_document(kind, length, index, style, tokenizer, options.questions, options.seed, options.essay)
        readings.append(read_prompts(made.only(options.tasks), style, tokenizer))
    if isinstance(reader, EngineReader):
        for arm in arms:
            yield [row_of(answer, reader.layers, tokenizer.decode) for answer in reader.read(readings, arm)]
        return
    probed = frozenset(reading.document.name for reading in readings[: options.probed])
    dense: dict[tuple[str, str], Answer] | None = None
    others = [arm for arm in arms if arm.config is not None]
    if len(others) < len(arms):
        answers = reader.read(readings, [Arm("dense", None)], None, probed)
        dense = {answer.key: answer for answer in answers}
        yield [row_of(answer, reader.layers, tokenizer.decode) for answer in answers]
    for first in range(0, len(others), MOST_ARMS):
        answers = reader.read(readings, others[first : first + MOST_ARMS], dense or {}, probed)
        yield [row_of(answer, reader.layers, tokenizer.decode) for answer in answers]
