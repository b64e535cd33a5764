"""A request on its way through the engine, the line in which it waits, and what it is charged with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.engine.config import Completion, Request, Status
from pipeline.engine.kv.arena import Extent, aligned
from pipeline.engine.memory.plan import MemoryPlan
from pipeline.engine.run.batch import MAX_STOP_IDS, RowStart
from pipeline.engine.run.masks import Constraint
from pipeline.engine.run.prefill import AttentionPlan, Prefill
from pipeline.engine.run.sampling import document_seed

# How many shorter documents may start before one that waits for a longer extent.
OVERTAKES = 32


@dataclass(eq=False)
class Document:
    """A request and what became of it so far; times are time.perf_counter()'s, in seconds.

    plan: how the prompt attends, once it has started. constraint: what may come next, where the request has a grammar.
    """

    request: Request
    prompt_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    stop_ids: tuple[int, ...] = ()
    added: float = field(default_factory=time.perf_counter)
    overtaken: int = 0
    extent: Extent | None = None
    prefill: Prefill | None = None
    started: float = 0.0
    first_token: float = 0.0
    decode_seconds: float = 0.0
    # Tokens that were launched (read back or not), and those that were read back.
    launched: int = 0
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    finished: bool = False
    plan: AttentionPlan | None = None
    constraint: Constraint | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def need(self) -> int:
        """Arena tokens that the document can come to."""
        return len(self.prompt_ids) + self.request.max_new_tokens

    def row_start(self) -> RowStart:
        """What the decode batch must know of the document."""
        assert self.extent is not None
        sampling = self.request.sampling
        return RowStart(
            extent=self.extent,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.request.max_new_tokens,
            seed=document_seed(sampling.seed, self.request.request_id),
            stop_ids=self.stop_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p,
        )

    def completion(self, status: Status, error: str, finish_reason: str, kernel: str) -> Completion:
        """The document as it stands, with times up to now."""
        now = time.perf_counter()
        started, first = self.started or now, self.first_token
        ran = {} if self.plan is None else vars(self.plan) | {"kernel": kernel}
        return Completion(
            request_id=self.request.request_id,
            status=status,
            error=error,
            token_ids=self.tokens,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            output_tokens=len(self.tokens),
            queue_seconds=started - self.added,
            prefill_seconds=(first or now) - started,
            decode_seconds=self.decode_seconds,
            time_to_first_token=first - started if first else None,
            peak_gpu_bytes=self.peak_bytes,
            **ran,
        )


def accept(
    document: Document,
    vocabulary: int,
    media: frozenset[int],
    eos: tuple[int, ...],
    plan: MemoryPlan,
    grammars: bool = False,
) -> tuple[Status, str] | None:
    """Check a document's request and fill in its prompt and stop ids; None, or the status and error it ends with.

    media: tokens that stand for images or sounds, which nothing here reads. grammars: as EngineConfig has it.
    """
    request = document.request
    if request.grammar is not None and not grammars:
        return "error", "its output is to follow a grammar, and the engine was made without EngineConfig(grammars=True)"
    try:
        ids = np.asarray(request.prompt_ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"got {ids.dtype}")
        ids = ids.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        return "error", f"prompt_ids must be integers: {error}"
    if ids.ndim != 1 or ids.size == 0:
        return "error", f"the prompt must be a row of at least one token, got shape {ids.shape}"
    document.prompt_ids = ids
    if ids.min() < 0 or ids.max() >= vocabulary:
        return "error", f"token ids must lie in [0, {vocabulary}), got {ids.min()} to {ids.max()}"
    found = media.intersection(ids.tolist()) if media else ()
    if found:
        return "error", f"the prompt holds token {min(found)}, which stands for an image or a sound: only text is read"
    if request.max_new_tokens < 1:
        return "error", f"max_new_tokens must be at least 1, got {request.max_new_tokens}"
    document.stop_ids = tuple(sorted({*eos, *request.stop_ids}))
    if len(document.stop_ids) > MAX_STOP_IDS:
        return "error", f"at most {MAX_STOP_IDS} stop ids are supported, got {len(document.stop_ids)}"
    if document.need > plan.max_context:
        return "too_long", (
            f"{ids.size:,} prompt tokens + {request.max_new_tokens:,} new tokens = {document.need:,}, but a document "
            f"can have {plan.max_context:,} (the model's context, or the KV arena of {plan.arena_tokens:,} tokens)"
        )
    return None


class WaitingLine:
    """Documents in the order of their arrival, out of which the next one that fits is taken."""

    def __init__(self) -> None:
        self._documents: deque[Document] = deque()

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)

    def append(self, document: Document) -> None:
        """Put a document at the end."""
        self._documents.append(document)

    def remove(self, document: Document) -> None:
        """Take a document out, wherever it stands."""
        self._documents.remove(document)

    def clear(self) -> None:
        """Forget all documents."""
        self._documents.clear()

    def take(self, largest_free: int) -> Document | None:
        """The first document whose extent fits into `largest_free` tokens, unless it would overtake one that was
        overtaken OVERTAKES times already; None leaves the line as it is.
        """
        for index, document in enumerate(self._documents):
            if aligned(document.need) <= largest_free:
                for position in range(index):
                    self._documents[position].overtaken += 1
                del self._documents[index]
                return document
            if document.overtaken >= OVERTAKES:
                return None
        return None


class Meter:
    """Charges decode time and peak memory to the documents that are in the engine."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        # Since when decode steps have been running that are charged to nobody yet; None outside of decoding.
        self._since: float | None = None

    def decoding(self) -> None:
        """Decode steps run from now on, if they do not already."""
        if self._since is None:
            self._since = time.perf_counter()

    def charge(self, documents: Iterable[Document]) -> None:
        """Add the decode time since the last call to each of the documents that took part."""
        if self._since is not None:
            now = time.perf_counter()
            for document in documents:
                document.decode_seconds += now - self._since
            self._since = now

    def prefilling(self) -> None:
        """Decode steps have ended; what follows is not charged."""
        self._since = None

    def note_peak(self, documents: Iterable[Document], reset: bool = False) -> None:
        """Raise the documents' peak to that of the GPUs together; `reset` starts a new peak for those that come."""
        if not self._gpus:
            return
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus)
        for document in documents:
            document.peak_bytes = max(document.peak_bytes, peak)
        if reset:
            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
