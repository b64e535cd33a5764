"""One evaluation: documents are made, read under every arm, and written as rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.evaluate.arms import make_arms
from jobs.evaluate.haystacks import KINDS
from jobs.evaluate.options import TEXT, Options
from jobs.evaluate.rows import write_rows
from jobs.evaluate.texts import Text, make_texts, text_rows
from jobs.known.prompts import MOST_ANSWER_TOKENS, Reading, Tokenizer, make_document, read_prompts
from jobs.known.reader import Arm, Reader, Reference
from jobs.known.results import Row, reading_rows
from jobs.known.wording import Style, pick_style
from jobs.measurement import dummy_copy
from pipeline.engine import EngineConfig
from pipeline.engine.model.loading import load_config
from pipeline.errors import JobError

# Seconds between two lines that tell how far an evaluation is.
TELL_EVERY = 20.0


def run(options: Options) -> dict[str, Any]:
    """Write options.output/rows/*.parquet as it goes. Returns facts about the run. Raises JobError."""
    begun = time.monotonic()
    if options.load_format != "dummy":  # of a model that is not there, the tokenizer's error would tell less
        load_config(EngineConfig(options.model, device=str(options.device), revision=options.revision))
    tokenizer = Tokenizer(options.tokenizer, options.revision)
    style = pick_style(options.style, tokenizer.vocabulary)
    arms = make_arms(options.arms, options.block_size, options.precisions)
    readers = load_readers(options)
    print("\n".join(describe(options, style, arms, readers)), flush=True)
    folder = options.output / "rows"
    stopped, told = "", time.monotonic()
    warm: set[int] = set()
    for part, document in enumerate(documents(options, style, tokenizer)):
        length = document.length if isinstance(document, Text) else document.document.length
        if options.device.type == "cuda" and length not in warm:
            # Kernels compile for seconds, more than a prefill takes, and differ by length: no row should have that.
            warm.add(length)
            read_document(document, readers, arms, tokenizer)
        rows = read_document(document, readers, arms, tokenizer)
        write_rows(rows, folder, part)
        seconds = time.monotonic() - begun
        name = document.name if isinstance(document, Text) else document.document.name
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            print(f"  {name}: {seconds:.0f} s since the start", flush=True)
        if seconds > options.time_limit:
            stopped = f"stopped by --time-limit behind {name}"
            print(stopped, flush=True)
            break
    return {"style": style.name, "seconds": time.monotonic() - begun, "stopped": stopped}


def load_readers(options: Options) -> list[Reader]:
    """The model in each precision, the most exact first. Raises JobError."""
    folder = model_folder(options)
    readers = []
    for precision in options.precisions:
        config = EngineConfig(
            options.fp8_model or folder if precision == "fp8" else folder,
            device=str(options.device),
            precision=precision,
            chunk_tokens=options.chunk_tokens,
            load_format=options.load_format,
            revision=options.revision,
            rope_scaling=options.rope_scaling,
            seed=options.seed,
        )
        readers.append(Reader(config, max(options.lengths) + MOST_ANSWER_TOKENS))
    if readers[-1].vocabulary != readers[0].vocabulary:
        raise JobError(
            f"--fp8-model {options.fp8_model} has {readers[-1].vocabulary:,} tokens, --model {options.model} "
            f"{readers[0].vocabulary:,}; expected the same model"
        )
    if max(options.lengths) > readers[0].limit:
        raise JobError(
            f"--lengths {max(options.lengths)}: {options.model} takes up to {readers[0].limit} tokens; --rope-scaling "
            "stretches that"
        )
    for index, reader in enumerate(readers):
        reader.allocate(1 / (len(readers) - index))
    return readers


def model_folder(options: Options) -> str:
    """The model; with random weights, a folder beside the results with its config."""
    if options.load_format == "dummy":
        return str(dummy_copy(options.model, options.output / "shape"))
    return options.model


def documents(options: Options, style: Style, tokenizer: Tokenizer) -> Iterator[Reading | Text]:
    """All documents, made as they are asked for: of each length one of each kind, then the next ones."""
    for length in options.lengths:
        texts = (
            make_texts(length, options.texts, tokenizer, options.seed, options.essay) if TEXT in options.tasks else []
        )
        for index in range(max(options.documents, len(texts))):
            for kind in options.kinds if index < options.documents else ():
                try:
                    made = make_document(
                        KINDS[kind], length, index, style, tokenizer, options.questions, options.seed, options.essay
                    )
                except JobError as error:
                    raise JobError(f"{error}; give larger --lengths or fewer --questions") from None
                yield read_prompts(made.only(options.tasks), style, tokenizer)
            yield from texts[index : index + 1]


def read_document(
    document: Reading | Text, readers: Sequence[Reader], arms: Sequence[Arm], tokenizer: Tokenizer
) -> list[Row]:
    """The rows of a document, under every arm in every precision; dense in the first one is what all are compared with.

    Each arm is used and left again for every document, so that the dense logits need be held for one document alone.
    """
    reference: Reference = {}
    rows = []
    for reader in readers:
        for arm in arms:
            reader.use(arm)
            if isinstance(document, Text):
                rows += text_rows(reader, document, reference)
            else:
                rows += reading_rows(reader, document, reference, tokenizer.decode)
    return rows


def describe(options: Options, style: Style, arms: Sequence[Arm], readers: Sequence[Reader]) -> list[str]:
    """What will run, in lines for the person who waits for it."""
    texts = f"; stretches of plain text at each length: {options.texts}" if TEXT in options.tasks else ""
    precisions = " and ".join(reader.precision for reader in readers)
    if options.fp8_model:
        precisions += f" (as stored in {options.fp8_model})"
    lines = [
        f"{options.model} on {options.device} in {precisions}, questions worded as in {style.name}; kinds of "
        f"documents: {', '.join(options.kinds) or 'none'}; of each kind at each length: {options.documents}; questions "
        f"of each sort to a document: {options.questions}{texts}"
    ]
    for length in options.lengths:
        lines.append(f"{length:,} tokens, {len(arms)} arms:")
        for arm in arms:
            readers[0].use(arm)
            density = readers[0].density(length)[1]
            told = "" if arm.config is None else f" B={arm.config.block_size} density {density:.3f} over all layers"
            few = "; dense at this length" if arm.config is not None and density == 1.0 else ""
            lines.append(f"  {arm.name}{told}{few}")
    return lines
