"""What a worker is told, and what it holds of a document: its questions, and how far each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pyarrow as pa

from pipeline.engine.config import Completion, EngineConfig, Sampling, SoFar
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.questions import Questions
from pipeline.prompts.task import Task
from pipeline.results.rows import Outcome, WorkerFields
from pipeline.settings.shared import ReadSettings
from pipeline.source import Document

# How long after its deadline a document may still hold the reader or the engine before the worker counts as hung. The
# end of a neighbour's prefill is one step of the engine, tens of seconds for a long prompt in a large model.
GRACE_SECONDS = 60.0


NOTHING = SoFar(0, 0)


@dataclass(frozen=True)
class WorkerConfig:
    """All that a worker needs to know. threads: for torch on a CPU; 0 leaves its default. deadline: seconds; 0 none.

    schemas: by question, JSON text of what its answers are held to. typed_answers: whether their column has the type of
    all of them; otherwise they are JSON text there.
    model_name: what the rows call the model. today: the date for chat templates that print one.
    evidence: whether rows get the passages that support the output.
    engine_factory: "module:name" of a callable EngineConfig -> engine.
    """

    engine: EngineConfig
    questions: Questions
    too_long: str
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    text_column: str
    model_name: str
    config_hash: str
    today: date
    template_args: Mapping[str, Any] | None = None
    thinking: str = "off"
    schemas: Mapping[str, str] = field(default_factory=dict)
    typed_answers: bool = True
    kept: tuple[pa.Field, ...] = ()
    evidence: bool = True
    reading: ReadSettings = ReadSettings()
    deadline: float = 0.0
    grace: float = GRACE_SECONDS
    threads: int = 0
    engine_factory: str = "pipeline.engine:Engine"


@dataclass(frozen=True)
class Place:
    """What a text is of its document. parts, index: of so many parts that one; 0: not a part of it.

    made_from: characters of the text of whose parts' outputs it is made; 0 for what stands in the document.
    """

    parts: int = 0
    index: int = 0
    made_from: int = 0

    @property
    def merges(self) -> bool:
        """Whether outputs of parts are to be merged."""
        return self.made_from > 0

    @property
    def is_document(self) -> bool:
        """Whether it is the document itself."""
        return not self.parts and not self.merges

    def may_split(self, size: int) -> bool:
        """Whether a text of `size` characters is processed in parts if it is too long: if there is an end to that."""
        return not self.parts and (not self.merges or size <= 0.9 * self.made_from)

    @property
    def name(self) -> str:
        """Of its prompts; empty for a whole."""
        return f"{self.parts}.{self.index}" if self.parts else ""


@dataclass
class Ask:
    """A question to a document that is in the worker: its row's columns as far as they are known.

    completions: of its prompts, in the order in which they came back. outcome: what became of it, once that is known.
    unread: characters [start, end) of the document's text that were cut out to make it fit.
    """

    task: Task
    builder: PromptBuilder
    fields: WorkerFields
    completions: list[Completion] = field(default_factory=list)
    outcome: Outcome | None = None
    unread: tuple[int, int] | None = None


@dataclass
class Work:
    """A document in the worker.

    fields: what its rows have in common, and the seconds that are spent once for all questions. columns: texts of the
    columns in its prompts. text: of the document. requests: ids of those that are in the engine. chunk_tokens: prefill
    steps at most so long; None: as the engine's configuration says. asks: its questions, once it is read.
    so_far: of the requests that the engine is done with.
    """

    document: Document
    fields: WorkerFields
    begun: float
    text: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    chunk_tokens: int | None = None
    requests: list[str] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    so_far: SoFar = NOTHING


def request_id(document_id: str, question: str, part: str) -> str:
    """The engine's name of a prompt: one for each document, question and part, whatever ids look like.

    Names of questions have neither # nor /. What is drawn in sampling depends on it, so it does not on other questions.
    """
    return f"{document_id}#{question}" + (f"/{part}" if part else "")


def document_of(name: str) -> str:
    """The document_id in an engine's name of a prompt."""
    return name.rpartition("#")[0]
