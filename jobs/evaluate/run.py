"""One evaluation: documents are made, read under every arm, and written as rows."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.evaluate.arms import Arm, make_arms
from jobs.evaluate.attention import prepare_model
from jobs.evaluate.options import Options
from jobs.evaluate.prompts import Tokenizer, make_document, read_prompts
from jobs.evaluate.reader import Reader
from jobs.evaluate.results import row_of, write_rows
from jobs.evaluate.wording import Style, pick_style
from pipeline.engine import EngineConfig
from pipeline.engine.loading import context_limit, load_model, stop_token_ids
from pipeline.errors import JobError
from stem_core.patch import UnsupportedModelError

# Keys and values that are held at once on a CPU, and the share of a GPU's free memory for them.
CPU_CACHE_BYTES = 2 << 30
GPU_CACHE_SHARE = 0.5


def cached_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens whose keys and values may be held at the same time."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 2 * text.num_hidden_layers * heads * width * next(model.parameters()).element_size()
    room = CPU_CACHE_BYTES if device.type == "cpu" else int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(room // size)


def load(options: Options) -> nn.Module:
    """The model with the evaluation's attention. Raises JobError."""
    device = str(options.device)
    model = load_model(
        EngineConfig(
            options.model,
            device=device,
            precision=options.precision,
            load_format=options.load_format,
            revision=options.revision,
            seed=options.seed,
        )
    )
    try:
        return prepare_model(model)
    except UnsupportedModelError as error:
        raise JobError(f"--model {options.model}: {error}") from None


def describe(options: Options, style: Style, arms: dict[int, list[Arm]]) -> list[str]:
    """What will run, in lines for the person who waits for it."""
    lines = [
        f"{options.model} on {options.device}, questions worded as in {style.name}; kinds of documents: "
        f"{', '.join(options.kinds)}; {options.documents} of each a length, {options.questions} questions of a kind"
    ]
    for length in options.lengths:
        sizes = options.block_sizes_for(length)
        blocks = ", ".join(f"B = {size} ({-(-length // size)} blocks)" for size in sizes)
        why = "as asked" if options.block_sizes else "the largest B that gives at least 256 blocks"
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
    print("\n".join(describe(options, style, arms)), flush=True)
    model = load(options)
    limit = context_limit(model.config)
    if max(options.lengths) > limit:
        raise JobError(f"--lengths {max(options.lengths)}: {options.model} takes up to {limit} tokens")
    reader = Reader(model, stop_token_ids(model), options.chunk_tokens, cached_tokens(model, options.device))
    rows = options.output / "rows"
    if rows.exists():
        shutil.rmtree(rows)  # an evaluation is one run; several are put together by --report
    stopped, part = "", 0
    for length in options.lengths:
        for kind in options.kinds:
            if time.monotonic() - begun > options.time_limit:
                stopped = stopped or f"stopped by --time-limit before {kind} at {length} tokens"
                continue
            _run_cell(options, style, tokenizer, reader, arms[length], kind, length, rows, part)
            part += 1
            print(f"  {length:,} tokens, {kind}: {time.monotonic() - begun:.0f} s since the start", flush=True)
    if stopped:
        print(stopped, flush=True)
    return {"style": style.name, "seconds": time.monotonic() - begun, "stopped": stopped, "layers": reader.layers}


def _run_cell(
    options: Options,
    style: Style,
    tokenizer: Tokenizer,
    reader: Reader,
    arms: list[Arm],
    kind: str,
    length: int,
    folder: Path,
    part: int,
) -> None:
    """All documents of one kind and length under all arms, dense first."""
    readings = []
    for index in range(options.documents):
        made = make_document(kind, length, index, style, tokenizer, options.questions, options.seed, options.essay)
        readings.append(read_prompts(made.only(options.tasks), style, tokenizer))
    probed = frozenset(reading.document.name for reading in readings[: options.probed])
    rows, dense = [], None
    for arm in arms:
        answers = reader.read(readings, arm, dense, probed)
        if arm.config is None:
            dense = {answer.key: answer for answer in answers}
        rows += [row_of(answer, arm, reader.layers, tokenizer.decode) for answer in answers]
    write_rows(rows, folder, part)
