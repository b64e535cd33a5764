"""What the scaling benchmark's jobs read: a shape's config with a tokenizer, and documents of exact lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import JobError
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.tokens import load_tokens
from tools.faults.corpus import READER, WORDS
from tools.shapes import shape_folder

OPENING, CLOSING = "Report", " end."


def model_folder(shape: str, folder: Path) -> Path:
    """A folder for load_format "dummy": the config of a shape, and the bundled tokenizer stretched to its vocabulary.

    The tokens that are added stand for no text, but each has a text of its own: of random weights nearly all outputs
    are such, and two outputs are to be the same only if their tokens are. There is no token that ends an output.
    Raises JobError for a shape that is not known or has a smaller vocabulary than the tokenizer.
    """
    shape_folder(shape, folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((READER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    if size < len(vocabulary):
        raise JobError(f"--shape {shape}: its vocabulary of {size} is smaller than the tokenizer's {len(vocabulary)}")
    # No merge makes them, and the pattern that splits words keeps letters and digits apart.
    vocabulary.update({f"Ġw{number}": number for number in range(len(vocabulary), size)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((READER / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_bytes((READER / "chat_template.jinja").read_bytes())
    return folder


def write_documents(path: Path, model: Path, lengths: Sequence[int]) -> dict[str, int]:
    """JSON lines of documents, always the same ones, whose prompts have these lengths; tokens by id.

    Raises JobError for a length that the question alone fills.
    """
    tokens = load_tokens(str(model))
    words = [f" {word}" for word in WORDS if len(tokens.encode_data(f" {word}")) == 1]
    builder = PromptBuilder(tokens, make_task("summarize", None, None))
    rest = len(builder.build(OPENING + words[0] + CLOSING, 1 << 40).ids) - 1  # of each prompt, its words apart
    if min(lengths) <= rest:
        raise JobError(f"--lengths: at least {rest + 1} tokens, the question takes {rest}; got {min(lengths)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            text = "".join(random.Random(number).choices(words, k=length - rest))
            file.write(json.dumps({"id": f"doc-{number:05}", "text": OPENING + text + CLOSING}) + "\n")
    return {f"doc-{number:05}": length for number, length in enumerate(lengths)}
