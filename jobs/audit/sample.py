"""Which documents are compared, and their prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jobs.audit.options import Options
from pipeline.errors import DocumentError, JobError, one_line
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import template_columns
from pipeline.prompts.tokens import Tokens
from pipeline.results.kept_columns import prompt_text
from pipeline.settings.questions import first_task
from pipeline.source import Catalogue, DocumentReader, find_files, list_documents


@dataclass(frozen=True)
class Sampled:
    """A document as it is asked. prompt: int32 [tokens], of which the question follows the first prefix_tokens.

    text: of the whole document.
    """

    document_id: str
    source: str
    prompt: np.ndarray
    prefix_tokens: int
    truncated_tokens: int
    text: str = ""


@dataclass(frozen=True)
class Sample:
    """The documents, longest prompt first; of how many; and those drawn that cannot be compared: (id, why)."""

    documents: list[Sampled]
    total: int
    left_out: list[tuple[str, str]]


def choose(catalogue: Catalogue, count: int, seed: int) -> list[int]:
    """Positions of `count` readable documents, one from each of as many equal shares of them ordered by size."""
    sizes = catalogue.columns[:, 3]
    readable = np.array([i for i in np.argsort(sizes, kind="stable") if int(i) not in catalogue.errors], dtype=np.int64)
    generator = np.random.default_rng(seed)
    shares = np.array_split(readable, min(count, len(readable))) if len(readable) else []
    return [int(generator.choice(share)) for share in shares]


def draw(options: Options, tokens: Tokens) -> Sample:
    """The sample of an audit. Raises JobError if no document of it can be compared."""
    job = options.job
    task = first_task(job)
    builder = PromptBuilder(tokens, task, job.chat_template_args, job.today(), job.thinking)
    files, _ = find_files(job.input)
    catalogue = list_documents(
        files, text_column=job.text_column, id_column=job.id_column, shard=job.shard_pair(), settings=job
    )
    reader = DocumentReader(job.text_column, [], job, template_columns(task.template))
    limit = options.context - job.max_new_tokens
    found, left_out = [], []
    for position in choose(catalogue, options.sample, options.seed):
        document = catalogue.document(position)
        try:
            text, kept = reader.read(document)
            columns = {name: prompt_text(value) for name, value in kept.prompt.items()}
            prompt = builder.build(text, limit, truncate=job.too_long == "truncate", columns=columns)
        except DocumentError as error:
            left_out.append((document.document_id, one_line(error)))
            continue
        read = prompt.ids, len(prompt.prefix), prompt.truncated_tokens
        found.append(Sampled(document.document_id, document.source, *read, text))
    if not found:
        why = f"{left_out[0][0]}: {left_out[0][1]}" if left_out else "none can be read"
        raise JobError(f"--input: none of the documents drawn can be compared; {why}")
    found.sort(key=lambda document: -len(document.prompt))
    return Sample(found, len(catalogue), left_out)
