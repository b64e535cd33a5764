"""How likely an engine finds a given output: read token by token, as if the engine itself had written it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.decode_attention import Prefixes
from kernels.fp8_heads import KEY_GROUP
from pipeline.engine.config import EngineConfig
from pipeline.engine.document import Document
from pipeline.engine.engine import Engine
from pipeline.engine.kv.arena import Extent
from pipeline.engine.kv.states import StateKey
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.batch import RowStart

# Gets log-probabilities float32 [tokens, V], on the engine's device; row i stands before token i of the output.
Note = Callable[[Tensor], None]


class TeacherForcingEngine(Engine):
    """An engine that also reads given outputs of its documents (teacher forcing), on the documents' own prefill.

    Nothing else changes: prompts are prefilled and outputs written as by Engine. What is read lies where the document's
    own output will be written over it. The first row is the prefill's; the others go through the decode path, a few in
    one batch of rows that share the document's extent (and the prefix behind which it may stand) and differ in how much
    of it they see. A model with recurrent states, which rows cannot share, reads one token after the other, and gets
    its states back.

    forcing_seconds: wall time spent so, which is in no completion's prefill_seconds or decode_seconds.
    """

    def __init__(self, config: EngineConfig, runner: ModelRunner | None = None) -> None:
        super().__init__(config, runner)
        self.forcing_seconds = 0.0
        self._expected: dict[str, tuple[list[int], Note]] = {}

    def expect(self, request_id: str, token_ids: Sequence[int], note: Note) -> None:
        """Read `token_ids` behind the prompt of a request that is added later, and hand over what is found.

        At most as many tokens as the request may write: a longer output ends the request with status "error".
        `note` is called inside step(), right after the prefill; what it raises ends the request likewise.
        """
        self._expected[request_id] = [int(token) for token in token_ids], note

    def _start_decoding(self, document: Document, logits: Tensor) -> None:
        extent = document.extent
        assert extent is not None
        token_ids, note = self._expected.pop(document.request.request_id, ([], None))
        if note is None:
            super()._start_decoding(document, logits)
            return
        states, row = self._arena.states, document.row_start()
        saved = None if states is None else states.saved(extent.start)
        super()._start_decoding(document, logits)
        begin = time.perf_counter()
        room = document.request.max_new_tokens
        if len(token_ids) > room:
            raise ValueError(f"an output of {len(token_ids)} tokens is to be read, the request has room for {room}")
        # A document that ended with its first token has given its extent back, but nothing has been written there yet.
        with self._states_of(extent, document.prompt_tokens, saved):
            note(self._read_along(row, logits, token_ids))
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.forcing_seconds += time.perf_counter() - begin

    @contextmanager
    def _states_of(self, extent: Extent, tokens: int, saved: Mapping[StateKey, Tensor] | None) -> Iterator[None]:
        """Inside, the extent has the states behind its `tokens` tokens, whatever is read; behind it, too, if it is
        still a document's.
        """
        states = self._arena.states
        if states is None or saved is None:
            yield
            return
        alive = states.has(extent.start)
        if not alive:
            states.enter(extent.start, 0, tokens)
        states.write(extent.start, saved)
        try:
            yield
        finally:
            if alive:
                states.write(extent.start, saved)
            else:
                states.release(extent.start)

    def _read_along(self, row: RowStart, logits: Tensor, token_ids: list[int]) -> Tensor:
        """float32 [tokens, V]."""
        log_probs = [logits.float().log_softmax(-1)]
        device = logits.device
        inputs = torch.tensor(token_ids[:-1], device=device)
        bound = row.prompt_tokens + row.max_new_tokens if row.bound is None else row.bound
        before = row.prefix_tokens  # they lie elsewhere
        first_own = row.prompt_tokens - before
        ends = first_own, first_own + len(inputs)
        for first, last in spans(*ends) if self._arena.states is None else ((i, i + 1) for i in range(*ends)):
            lengths = torch.arange(before + first + 1, before + last + 1, device=device)
            rows = self._runner.decode(
                inputs[first - first_own : last - first_own],
                torch.full_like(lengths, row.extent.start),
                lengths,
                torch.full_like(lengths, bound),
                self._arena,
                self._plan.max_context,
                Prefixes.of_all(len(lengths), row.prefix_start, before, self._plan.max_context, device)
                if before
                else None,
            )
            log_probs.append(rows.float().log_softmax(-1))
        return torch.cat(log_probs)[: len(token_ids)]


def spans(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Positions [first, last) in portions that can be appended to an arena at once, in whatever order.

    In an fp8 arena the token that opens a group clears the places of the others: it goes alone, before them. Extents
    begin with a group.
    """
    while first < last:
        end = first + 1 if first % KEY_GROUP == 0 else min(last, (first // KEY_GROUP + 1) * KEY_GROUP)
        yield first, end
        first = end
