"""A request on its way through the engine, the line in which it waits, and what it is charged with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.engine.config import Completion, Request, SoFar, Status
from pipeline.engine.kv.arena import ALIGNMENT, Extent, aligned
from pipeline.engine.memory.plan import MemoryPlan
from pipeline.engine.run.batch import MAX_STOP_IDS, RowStart
from pipeline.engine.run.lookup import Gain
from pipeline.engine.run.masks import Constraint
from pipeline.engine.run.prefill import AttentionPlan, Prefill
from pipeline.engine.run.sampling import document_seed
from pipeline.engine.run.tail import TailPrefill

if TYPE_CHECKING:
    from pipeline.engine.prefix import Prefix

# How many shorter documents may start before one that waits for a longer extent.
OVERTAKES = 32


@dataclass(eq=False)
class Document:
    """A request and what became of it so far; times are time.perf_counter()'s, in seconds.

    plan: how the prompt attends, once it has started. constraint: what may come next, where the request has a grammar.
    prefix: what stands before prompt_ids, read for others too; None: prompt_ids are the whole prompt.
    """

    request: Request
    prompt_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    stop_ids: tuple[int, ...] = ()
    added: float = field(default_factory=time.perf_counter)
    overtaken: int = 0
    extent: Extent | None = None
    prefill: Prefill | TailPrefill | None = None
    started: float = 0.0
    first_token: float = 0.0
    decode_seconds: float = 0.0
    # Tokens that were launched, as far as it is known of them, and those that were read back.
    launched: int = 0
    tokens: list[int] = field(default_factory=list)
    # Decode steps that gave it tokens, and what those with drafts give.
    decode_steps: int = 0
    gain: Gain = field(default_factory=Gain)
    peak_bytes: int = 0
    finished: bool = False
    plan: AttentionPlan | None = None
    constraint: Constraint | None = None
    prefix: Prefix | None = None

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the prompt that lie in another extent."""
        return 0 if self.prefix is None else self.prefix.tokens

    @property
    def prompt_tokens(self) -> int:
        return self.prefix_tokens + len(self.prompt_ids)

    @property
    def need(self) -> int:
        """Tokens that the document's own extent can come to."""
        return len(self.prompt_ids) + self.request.max_new_tokens

    @property
    def documents(self) -> Sequence[Document]:
        """As for a Prefix: those that wait with this place in the line."""
        return (self,)

    @property
    def so_far(self) -> SoFar:
        """Of a prompt that is read; the prefix is not its own."""
        seconds = max(0.0, self.first_token - self.started)
        return SoFar(len(self.prompt_ids), len(self.tokens), seconds, self.decode_seconds)

    def row_start(self) -> RowStart:
        """What the decode batch must know of the document."""
        assert self.extent is not None
        sampling = self.request.sampling
        extent, prefix = self.extent, self.prefix
        shared: dict[str, int] = {}
        if prefix is not None and prefix.extent is not None:
            # Its length alone bounds what follows it, since it was read for many (pipeline.engine.model.rope).
            shared = {"bound": prefix.tokens}
            if prefix.in_one_piece:
                extent = Extent(prefix.extent.start, prefix.extent.tokens + extent.tokens)
            else:
                shared |= {"prefix_start": prefix.extent.start, "prefix_tokens": prefix.tokens}
        return RowStart(
            extent=extent,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.request.max_new_tokens,
            seed=document_seed(sampling.seed, self.request.request_id),
            stop_ids=self.stop_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            prompt_ids=None if sampling.repetition_penalty == 1 else self._all_prompt_ids(),
            **shared,
        )

    def _all_prompt_ids(self) -> np.ndarray:
        before = [] if self.prefix is None else [self.prefix.ids]
        return np.concatenate([*before, self.prompt_ids])

    def completion(self, status: Status, error: str, finish_reason: str, kernel: str) -> Completion:
        """The document as it stands, with times up to now."""
        now = time.perf_counter()
        started, first = self.started or now, self.first_token
        read_before, prefix_seconds, waited = 0, 0.0, started - self.added
        if self.prefix is not None:
            waited -= self.prefix.seconds
            read_before, prefix_seconds = self.prefix.charge()
        ran = {} if self.plan is None else vars(self.plan) | {"kernel": kernel}
        return Completion(
            request_id=self.request.request_id,
            status=status,
            error=error,
            token_ids=self.tokens,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            output_tokens=len(self.tokens),
            prefix_tokens=read_before,
            queue_seconds=max(0.0, waited),
            prefill_seconds=prefix_seconds + (first or now) - started,
            decode_seconds=self.decode_seconds,
            time_to_first_token=prefix_seconds + first - started if first else None,
            peak_gpu_bytes=self.peak_bytes,
            tokens_per_step=(len(self.tokens) - 1) / self.decode_steps if self.decode_steps else None,
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
    ids = checked_ids(request.prompt_ids, "prompt", vocabulary, media)
    if isinstance(ids, str):
        return "error", ids
    document.prompt_ids = ids if document.prefix is None else np.concatenate([document.prefix.rest, ids])
    if request.max_new_tokens < 1:
        return "error", f"max_new_tokens must be at least 1, got {request.max_new_tokens}"
    document.stop_ids = tuple(sorted({*eos, *request.stop_ids}))
    if len(document.stop_ids) > MAX_STOP_IDS:
        return "error", f"at most {MAX_STOP_IDS} stop ids are supported, got {len(document.stop_ids)}"
    prompt = document.prompt_tokens
    tokens = prompt + request.max_new_tokens
    if tokens > plan.max_context:
        return "too_long", (
            f"{prompt:,} prompt tokens + {request.max_new_tokens:,} new tokens = {tokens:,}, but a document "
            f"can have {plan.max_context:,} (the model's context, or the KV arena of {plan.arena_tokens:,} tokens)"
        )
    shared = aligned(document.prefix_tokens)
    if shared and shared + aligned(document.need) > aligned(plan.arena_tokens):
        return "too_long", (
            f"a prefix of {document.prefix_tokens:,} tokens and {document.need:,} tokens behind it, prompt and output, "
            f"take {shared + aligned(document.need):,} tokens of the KV arena in units of {ALIGNMENT}, which has "
            f"{plan.arena_tokens:,}"
        )
    return None


def checked_ids(
    given: Sequence[int] | np.ndarray, name: str, vocabulary: int, media: frozenset[int]
) -> np.ndarray | str:
    """Token ids as int64 [tokens], at least one, or what is wrong with them. name: of what they are."""
    try:
        ids = np.asarray(given)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"got {ids.dtype}")
        ids = ids.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        return f"{name}_ids must be integers: {error}"
    if ids.ndim != 1 or ids.size == 0:
        return f"the {name} must be a row of at least one token, got shape {ids.shape}"
    if ids.min() < 0 or ids.max() >= vocabulary:
        return f"token ids must lie in [0, {vocabulary}), got {ids.min()} to {ids.max()}"
    found = media.intersection(ids.tolist()) if media else ()
    if found:
        return f"the {name} holds token {min(found)}, which stands for an image or a sound: only text is read"
    return ids


class WaitingLine:
    """Documents, and prefixes with those that share them, in the order of their arrival, out of which the next one that
    fits is taken.
    """

    def __init__(self) -> None:
        self._documents: deque[Document | Prefix] = deque()

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document | Prefix]:
        return iter(self._documents)

    def append(self, document: Document | Prefix) -> None:
        """Put a document at the end."""
        self._documents.append(document)

    def remove(self, document: Document | Prefix) -> None:
        """Take a document out, wherever it stands."""
        self._documents.remove(document)

    def clear(self) -> None:
        """Forget all documents."""
        self._documents.clear()

    def take(self, largest_free: int) -> Document | Prefix | None:
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
