"""The engine: documents in, completions out, one unit of work at a time.

Policy. Prefill is bound by arithmetic and costs the same whenever it runs. A decode step is bound by reading the
weights and the KV of the live documents, and reads the weights once for all of them. So documents an hour are highest
when as few decode steps as possible serve as many documents as possible each: whenever the next document fits, its
prefill goes first; when nothing more fits, the live documents decode together, until one ends and makes room. A shorter
document may overtake one that does not fit yet, a bounded number of times; then the arena drains until that one fits.
Requests behind a shared prefix that is in the arena go before all others: what they share is held for them.

Memory cannot be over-committed: a document starts when its whole extent (prompt + max_new_tokens) is reserved, a shared
prefix when there is room for it and the longest of its requests.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.config import Completion, EngineConfig, EngineError, Request, SharedPrompt, SoFar, Status
from pipeline.engine.describe import describe_engine, describe_kernels, few_whole_layers, slower_paths
from pipeline.engine.devices import check_devices, is_out_of_memory, release_memory
from pipeline.engine.document import Document, Meter, WaitingLine, accept, checked_ids
from pipeline.engine.kv.arena import Extent, aligned
from pipeline.engine.laps import Laps
from pipeline.engine.memory.measure import allocate_arena, load_and_plan
from pipeline.engine.memory.plan import MemoryPlan
from pipeline.engine.model.loading import stop_token_ids
from pipeline.engine.model.precision import wide_notes
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.model.text_part import media_tokens
from pipeline.engine.prefix import Prefix
from pipeline.engine.run.batch import IDLE, NOT_FINITE, DecodeBatch
from pipeline.engine.run.decode import DecodeRunner, Readback, StepKey, batch_bucket, group_bucket
from pipeline.engine.run.lookup import DRAFTS, PAYS, LookupPolicy
from pipeline.engine.run.masks import Constraint, TokenMasks
from pipeline.engine.run.prefill import Prefill, attention_plan, chunk_size
from pipeline.engine.run.tail import TailPrefill
from stem_core.errors import first_line


class Engine:
    """One model on its device or devices. Not thread-safe: add(), step() and abort() belong to one thread.

    runner: a model that is loaded already, in `config`'s precision, which this engine switches to `config`'s attention;
    None loads it. Engines may share a runner one after the other.
    Raises EngineError (ModelLoadError for the model's files) if the model cannot be loaded or run here.
    """

    def __init__(self, config: EngineConfig, runner: ModelRunner | None = None) -> None:
        self.config = config
        self._chunk = chunk_size(config.chunk_tokens, config.attention)
        if config.torch_device().type == "cuda":
            torch.cuda.set_device(config.torch_device())
        laps = Laps()
        self._runner, plan = load_and_plan(config, runner, self._chunk)
        if runner is None:
            laps = self._runner.laps
        laps.end("memory plan")
        self._devices = self._runner.devices
        device = self._device = self._runner.device  # of the decode batch
        on_gpu = device.type == "cuda"
        self._eos = stop_token_ids(self._runner.model)
        self._media = media_tokens(self._runner.model.config)
        self._arena, self._plan = allocate_arena(self._runner, config, plan, self._chunk)
        laps.end("arena")
        self._batch = DecodeBatch(config.max_live, device, self._runner.vocabulary)
        self._lag = config.decode_lag if config.decode_lag is not None else 2 * on_gpu
        use_graphs = on_gpu and config.cuda_graphs
        # A state that has read a wrong draft cannot go back.
        use_lookup = config.prompt_lookup == "auto" and not self._runner.states
        self._lookup = LookupPolicy(PAYS["cuda" if on_gpu else "cpu"]) if use_lookup else None
        places = 1 + DRAFTS if use_lookup else 1
        self._masks = TokenMasks(config.max_live, self._runner.vocabulary, device, places) if config.grammars else None
        self._decode = DecodeRunner(
            self._runner, self._arena, self._batch, self._plan.max_context, use_graphs,
            None if self._masks is None else self._masks.device, lookup=use_lookup,
        )  # fmt: skip
        try:
            self._decode.prepare()
        except torch.OutOfMemoryError as error:
            where = ", ".join(map(str, self._devices))
            raise EngineError(
                f"the decode steps of up to {config.max_live} documents do not fit {where} beside an arena of "
                f"{self._plan.arena_tokens:,} tokens: lower max_live or arena_tokens"
            ) from error
        laps.end("decode steps")
        self._start_seconds = dict(laps.seconds)
        self._readback: Readback[list[tuple[int, Document]]] = Readback(
            config.max_live * (1 + DRAFTS), self._lag + 1, device
        )
        self._drafted: Readback[None] = Readback(config.max_live * DRAFTS, 1, device)
        self._waiting = WaitingLine()
        self._prefilling: Document | None = None
        self._prefixes: list[Prefix] = []  # that hold an extent
        self._reading: Prefix | None = None
        self._live: dict[int, Document] = {}
        self._done: list[Completion] = []
        self._meter = Meter(self._devices)

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do or to hand over."""
        return bool(self._waiting or self._prefilling or self._prefixes or self._live or self._done)

    @property
    def live(self) -> int:
        """Documents that decode together now."""
        return len(self._live)

    @property
    def max_context(self) -> int:
        """Most tokens of one document, prompt and output."""
        return self._plan.max_context

    @property
    def arena_use(self) -> tuple[int, int]:
        """Tokens of the KV arena that documents hold, and all it has. Any thread may ask."""
        extents = self._arena.extents
        return extents.capacity - extents.free_tokens, extents.capacity

    @property
    def so_far(self) -> dict[str, SoFar]:
        """By request_id, how far those are that have begun. A prefix is told of one of the requests behind it."""
        done = {each.request.request_id: each.so_far for each in self._live.values()}
        if self._prefilling is not None and isinstance(self._prefilling.prefill, Prefill):
            done[self._prefilling.request.request_id] = SoFar(self._prefilling.prefill.start, 0)
        for prefix in self._prefixes:
            name = (*prefix.live, *prefix.waiting)[0].request.request_id
            read = prefix.prefill.start if prefix.prefill else prefix.is_read * prefix.tokens
            done[name] = done.get(name, SoFar(0, 0)).and_(SoFar(read, 0, prefix.owed_seconds))
        return done

    def plan(self) -> MemoryPlan:
        """How the device's memory is divided."""
        return self._plan

    def describe(self) -> dict[str, Any]:
        """What runs here: device, precision, attention, kernels, decode mode, versions. dtype: of activations; kernels
        and slower (sentences): for the longest prompts. notes: sentences on what is not as one might expect.
        start_seconds: of the parts of its start, in their order; those of the model only where it was not given."""
        notes = [*wide_notes(self._runner.precision, self._runner.calibration), *few_whole_layers(self._runner)]
        if self._lookup is None and self.config.prompt_lookup == "auto":
            notes.append(
                "prompt lookup is off: the model keeps recurrent states, which cannot go back on a wrong draft"
            )
        return describe_engine(self._runner, self.config) | {
            "chunk_tokens": self._chunk,
            "kernels": describe_kernels(self._runner, self.max_context),
            "slower": slower_paths(self._runner, self.max_context),
            "notes": notes,
            "prompt_lookup": "off" if self._lookup is None else f"{DRAFTS} drafts a step while they pay",
            "decode": self._decode.mode,
            "start_seconds": {name: round(seconds, 3) for name, seconds in self._start_seconds.items()},
        }

    def add(self, request: Request) -> None:
        """Queue a document. One that cannot run ends in a Completion with status "error" or "too_long", never in an
        exception; only an id that is in the engine already raises ValueError.
        """
        if self._find(request.request_id) is not None:
            raise ValueError(f"request_id {request.request_id!r} is in the engine already")
        document = Document(request)
        problem = self._accept(document)
        if problem is None:
            self._waiting.append(document)
        else:
            self._end(document, *problem)

    def _accept(self, document: Document) -> tuple[Status, str] | None:
        return accept(
            document, self._runner.vocabulary, self._media, self._eos, self._plan, grammars=self.config.grammars
        )

    def add_shared(self, shared: SharedPrompt) -> None:
        """Queue requests that share the beginning of their prompts, which is read once. Each ends in a Completion of
        its own, as after add(), also one that cannot run: with a prefix that cannot be read, all of them.

        They begin in their order, more than there is room for in waves. Raises ValueError for no requests, and for an
        id that is in the engine already or that two of them have.
        """
        ids = [request.request_id for request in shared.requests]
        if not ids:
            raise ValueError("a SharedPrompt has at least one request, got none")
        for position, request_id in enumerate(ids):
            if request_id in ids[:position]:
                raise ValueError(f"two requests of a SharedPrompt have the request_id {request_id!r}")
            if self._find(request_id) is not None:
                raise ValueError(f"request_id {request_id!r} is in the engine already")
        prefix_ids = checked_ids(shared.prefix_ids, "prefix", self._runner.vocabulary, self._media)
        problem: tuple[Status, str] | None = None
        if isinstance(prefix_ids, str):
            problem = "error", prefix_ids
        chunks = [request.chunk_tokens for request in shared.requests if request.chunk_tokens is not None]
        beginning = np.zeros(0, np.int64) if isinstance(prefix_ids, str) else prefix_ids
        prefix = Prefix.of(beginning, min(chunks, default=None), len(ids), self._arena.states is not None)
        for request in shared.requests:
            document = Document(request, prefix=prefix)
            found = problem or self._accept(document)
            if found is None:
                prefix.waiting.append(document)
            else:
                self._end(document, *found)
        if prefix.waiting:
            self._waiting.append(prefix)

    def abort(self, request_id: str) -> bool:
        """Drop a document without a completion; others that share its prefix stay. Returns whether it was in the
        engine.
        """
        document = self._find(request_id)
        if document is not None:
            self._release(document)
        return document is not None

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Advance by one unit of work, a prefill chunk or a decode step; return what ended since the last call.

        On a GPU the work is launched, not waited for, except at the end of a prefill (with StemConfig.max_output_error
        a chunk waits for the one before). Raises EngineError when the device is lost: only a new process can use it
        again.
        """
        if self._prefilling is None and self._reading is None:
            self._admit()
        if self._reading is not None:
            self._read_prefix(self._reading)
        elif self._prefilling is not None:
            self._prefill_step(self._prefilling)
        elif self._live:
            self._decode_step()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Give the device's memory back; the engine is of no use afterwards."""
        self._waiting.clear()
        self._live.clear()
        self._prefilling = self._reading = None
        self._prefixes.clear()
        del self._decode, self._batch, self._arena, self._runner, self._readback, self._drafted, self._masks
        release_memory(*self._devices)

    def _current(self) -> list[Document]:
        """Documents that hold an extent, or whose prefix does."""
        behind = [document for prefix in self._prefixes for document in prefix.waiting]
        return [*self._live.values(), *([self._prefilling] if self._prefilling else []), *behind]

    def _find(self, request_id: str) -> Document | None:
        everyone = [*(document for entry in self._waiting for document in entry.documents), *self._current()]
        return next((document for document in everyone if document.request.request_id == request_id), None)

    # -- units of work

    def _admit(self) -> None:
        """Start the next document or prefix that fits, if a row of the decode batch is free for it."""
        if len(self._live) >= self.config.max_live:
            return
        document = self._next_behind_prefix()
        entry = document or self._next_waiting()
        if entry is None:
            return
        # Steps in flight belong to the decode time of the live documents, not to this one's prefill.
        self._collect_all()
        self._meter.prefilling()
        self._meter.note_peak(self._current(), reset=True)
        if document is not None:
            self._enter_behind_prefix(document)
            return
        extent = self._arena.extents.allocate(entry.need)
        assert extent is not None, "it was checked that it fits"
        if isinstance(entry, Prefix):
            entry.enter(extent)
            entry.plan = attention_plan(self._runner, entry.tokens)
            self._prefixes.append(entry)
            self._reading = entry
        else:
            entry.started = time.perf_counter()
            entry.plan = attention_plan(self._runner, entry.prompt_tokens)
            entry.extent = extent
            self._prefilling = entry

    def _next_waiting(self) -> Document | Prefix | None:
        """Out of the waiting line. Where there are states, a prefix has its own until its last request has begun."""
        states = self._arena.states
        needed = 2 if any(isinstance(entry, Prefix) for entry in self._waiting) else 1
        if states is not None and states.free < needed:
            return None
        return self._waiting.take(self._arena.extents.largest_free)

    def _next_behind_prefix(self) -> Document | None:
        """The next request of a prefix that was read, if it fits; those of a prefix without a live one come first."""
        states = self._arena.states
        if states is not None and not states.free:
            return None
        free = self._arena.extents.largest_free
        for prefix in sorted(self._prefixes, key=lambda prefix: len(prefix.live) > 0):
            if prefix.is_read and prefix.waiting and (prefix.lane_free or aligned(prefix.waiting[0].need) <= free):
                return prefix.waiting[0]
        return None

    def _enter_behind_prefix(self, document: Document) -> None:
        """Give a request of a prefix that was read its extent: the prefix's lane, or one of its own."""
        prefix = document.prefix
        assert prefix is not None
        prefix.waiting.remove(document)
        prefix.live.append(document)
        if prefix.lane_free:
            document.extent, prefix.lane_free = prefix.lane, False
        else:
            document.extent = self._arena.extents.allocate(document.need)
        document.started = time.perf_counter()
        document.plan = prefix.plan
        self._prefilling = document

    def _chunk_of(self, asked: int | None) -> int:
        """Tokens of a prefill step. asked: at most, if that is less than the engine's own."""
        return min(self._chunk, chunk_size(asked or self._chunk, self.config.attention))

    def _read_prefix(self, prefix: Prefix) -> None:
        """A step of the prefill of a prefix, whose keys and values are all that is wanted."""
        try:
            if prefix.prefill is None:
                assert prefix.extent is not None
                chunk = self._chunk_of(prefix.chunk_tokens)
                prefix.prefill = Prefill(self._runner, self._arena, prefix.extent, prefix.ids, 0, chunk)
            prefix.prefill.step()
            prefix.plan = prefix.prefill.plan
            if prefix.prefill.done:
                for device in self._devices:
                    if device.type == "cuda":  # what follows must not be charged with it
                        torch.cuda.synchronize(device)
                prefix.stop_clock()
                prefix.prefill = self._reading = None
        except Exception as error:
            prefix.stop_clock()
            for document in prefix.waiting:
                document.plan = prefix.plan
            self._fail(list(prefix.waiting), error)

    def _prefill_step(self, document: Document) -> None:
        try:
            if document.prefill is None:
                assert document.extent is not None
                document.prefill = self._new_prefill(document, document.extent)
            logits = document.prefill.step()
            if isinstance(document.prefill, Prefill):
                document.plan = document.prefill.plan
            if document.prefill.done:
                assert logits is not None
                self._start_decoding(document, logits)
        except Exception as error:
            self._fail([document], error)

    def _new_prefill(self, document: Document, extent: Extent) -> Prefill | TailPrefill:
        prefix = document.prefix
        if prefix is None:
            request = document.request
            chunk = self._chunk_of(request.chunk_tokens)
            return Prefill(self._runner, self._arena, extent, document.prompt_ids, request.max_new_tokens, chunk)
        assert prefix.extent is not None
        tail = TailPrefill(
            self._runner, self._arena, prefix.extent, prefix.tokens, extent, document.prompt_ids, self.max_context
        )
        if not prefix.waiting:  # nobody will begin from its states any more
            self._arena.forget(prefix.extent)
        return tail

    def _start_decoding(self, document: Document, logits: Tensor) -> None:
        """Give the document a row and its first token, and wait for that token."""
        row = min(set(range(self.config.max_live)) - set(self._live))
        # From here on _release() clears the row, whatever fails: one that went on would write where others are by then.
        self._prefilling = None
        self._live[row] = document
        self._batch.begin(row, document.row_start())
        masks = None
        if document.request.grammar is not None:
            assert self._masks is not None, "accept() lets no grammar pass without"
            document.constraint = Constraint(document.request.grammar.matcher(), document.stop_ids)
            self._masks.send({row: document.constraint}, range(row, row + 1))
            masks = self._masks.device[row : row + 1]
        self._batch.advance(logits, row, not document.request.sampling.is_plain, masks)
        document.prefill = None
        document.launched = 1
        if self._lookup is not None:
            document.gain = self._lookup.new_gain()
        self._readback.push(self._batch.report[row : row + 1, None], [(0, document)])
        self._collect_all()

    def _decode_step(self) -> None:
        self._meter.decoding()
        self._close_gaps()
        running = {row: doc for row, doc in self._live.items() if doc.launched < doc.request.max_new_tokens}
        try:
            if running:
                key = StepKey(
                    rows=batch_bucket(max(running) + 1, self.config.max_live),
                    sampled=any(not document.request.sampling.is_plain for document in running.values()),
                    shared=group_bucket(self._batch.largest_group),
                    drafts=self._drafts(list(running.values())),
                )
                if any(document.constraint is not None for document in running.values()):
                    self._masked_step(key, running)
                else:
                    self._decode.run(key)
                report = self._batch.verified if key.drafts else self._batch.report[:, None]
                self._readback.push(report[: key.rows], list(running.items()))
                for document in running.values():
                    document.launched += 1
            # Without a step to hide behind, what is in flight is all that is left to wait for.
            while len(self._readback) > (self._lag if running else 0):
                self._collect()
        except Exception as error:
            self._fail(self._victims(error), error)

    def _drafts(self, running: list[Document]) -> int:
        """How many drafts of each document the next step verifies.

        None where an output has a repetition penalty, by which every token changes the scores of the next; and where
        some documents share a prefix and others do not: these would read their keys once for every draft.
        """
        if self._lookup is None or any(doc.request.sampling.repetition_penalty != 1 for doc in running):
            return 0
        if len({document.prefix is None or document.prefix.in_one_piece for document in running}) > 1:
            return 0
        return self._lookup.drafts([document.gain for document in running])

    def _masked_step(self, key: StepKey, running: dict[int, Document]) -> None:
        """A step in which outputs follow grammars: masks are made of the tokens before it while the model runs.

        Rows whose documents turn out to have ended are idle by the time that the step samples.
        """
        assert self._masks is not None, "accept() lets no grammar pass without"
        if key.drafts:
            self._decode.draft(key)
            self._drafted.clear()  # of a step that failed
            self._drafted.push(self._batch.drafts[: key.rows], None)
        self._decode.forward(key)
        drafts = self._drafted.pop()[0] if key.drafts else None
        self._collect_all()
        there = {row: document.constraint for row, document in running.items() if not document.finished}
        constraints = {row: constraint for row, constraint in there.items() if constraint is not None}
        self._masks.send(constraints, range(key.rows), drafts)
        self._decode.sample(key)

    def _collect(self) -> None:
        """Wait for the oldest step in flight and take its tokens; those of documents that ended before are dropped."""
        report, documents = self._readback.pop()
        self._meter.charge(self._live.values())
        for index, document in documents:
            if not document.finished:
                self._take(document, report[index])

    def _take(self, document: Document, tokens: list[int]) -> None:
        """Add what a step gave a document: its next tokens, and IDLE behind them."""
        assert tokens[0] != IDLE, "a row stopped on the device before its document ended on the host"
        given = [token for token in tokens if token != IDLE]
        if document.tokens:
            document.decode_steps += 1
            document.launched += len(given) - 1
            if len(tokens) > 1:
                document.gain.note(len(given))
        for token in given:
            if token == NOT_FINITE:
                message = f"the model returned logits that are not finite at output token {len(document.tokens)}"
                self._end(document, "error", message)
                return
            if not document.tokens:
                document.first_token = time.perf_counter()
            document.tokens.append(token)
            matcher = None if document.constraint is None else document.constraint.matcher
            if token in document.stop_ids:
                self._end(document, "ok", finish_reason="stop")
                continue
            if matcher is not None:
                matcher.take(token)
            if matcher is not None and matcher.error:
                self._end(document, "error", f"the output cannot go on by its grammar: {matcher.error}")
                return
            if matcher is not None and matcher.done:
                self._end(document, "ok", finish_reason="stop")
                return
            if self._reached(document):
                return  # drafts that were right may lie behind it
            if len(document.tokens) == document.request.max_new_tokens:
                self._end(document, "ok", finish_reason="length")

    def _reached(self, document: Document) -> bool:
        """Whether the newest token ends the output by Request.until, or an error of it does."""
        until = document.request.until
        try:
            if until is None or not until(document.tokens):
                return False
        except Exception as error:
            self._end(document, "error", f"its text cannot be searched for where to stop: {first_line(error)}")
            return True
        self._end(document, "ok", finish_reason="stop_string")
        return True

    def _collect_all(self) -> None:
        while len(self._readback):
            self._collect()

    # -- endings

    def _victims(self, error: Exception) -> list[Document]:
        """Who ends when a decode step fails: out of memory the newest document alone, otherwise all live ones.

        All of them, too, where some layers' recurrent states may be those behind the step's token, and others' not yet:
        the step cannot be run again.
        """
        live = sorted(self._live.values(), key=lambda document: document.started)
        return live[-1:] if is_out_of_memory(error) and not self._runner.states else live

    def _fail(self, documents: list[Document], error: Exception) -> None:
        """End documents after an exception in their unit of work. Raises EngineError if the device is lost."""
        check_devices(self._devices, error)
        status: Status = "oom" if is_out_of_memory(error) else "error"
        # The traceback holds the tensors of the unit that failed.
        error.__traceback__ = None
        self._collect_all()
        for document in documents:
            if not document.finished:
                self._end(document, status, f"{type(error).__name__}: {error}")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _end(self, document: Document, status: Status, error: str = "", finish_reason: str = "error") -> None:
        """Hand the document over as a completion and release what it holds."""
        self._meter.note_peak(self._current())
        self._release(document)
        kernel = ""
        if document.plan is not None:
            dense = document.plan.attention == "dense"
            tokens = document.prompt_tokens if document.prefix is None else document.prefix.tokens
            used = describe_kernels(self._runner, tokens, dense=dense)
            kernel = ", ".join(f"{name}: {chosen}" for name, chosen in used.items())
        self._done.append(document.completion(status, error, finish_reason, kernel))

    def _release(self, document: Document) -> None:
        """Take the document out of wherever it is; the arena extent and the row are free afterwards."""
        document.finished = True
        document.prefill = None
        if document.constraint is not None:
            document.constraint.matcher.close()
            document.constraint = None
        if document in self._waiting:
            self._waiting.remove(document)
        if self._prefilling is document:
            self._prefilling = None
        if document.prefix is not None:
            self._leave_prefix(document, document.prefix)
        elif document.extent is not None:
            self._arena.release(document.extent)
        document.extent = None
        row = next((row for row, live in self._live.items() if live is document), None)
        if row is not None:
            del self._live[row]
            self._batch.clear(row)

    def _close_gaps(self) -> None:
        """Move documents into rows that became free, so that the batch can shrink to a smaller bucket.

        Between steps: a step that is half done has logits by row.
        """
        while self._live and max(self._live) >= len(self._live):
            last = max(self._live)
            row = min(set(range(last)) - set(self._live))
            self._batch.move(last, row)
            self._live[row] = self._live.pop(last)

    def _leave_prefix(self, document: Document, prefix: Prefix) -> None:
        """Take a request away from its prefix; what nobody will need any more is free afterwards."""
        if document in prefix.waiting:
            prefix.waiting.remove(document)
        if document in prefix.live:
            prefix.live.remove(document)
        if document.extent is not None and document.extent is prefix.lane:
            self._arena.forget(prefix.lane)
            prefix.lane_free = True
        elif document.extent is not None:
            self._arena.release(document.extent)
        if prefix.waiting:
            return
        if prefix.lane is not None and prefix.lane_free:
            self._arena.release(prefix.lane)
            prefix.lane, prefix.lane_free = None, False
        if prefix.live:
            return
        if prefix in self._waiting:
            self._waiting.remove(prefix)
        if prefix.extent is not None:
            self._arena.release(prefix.extent)
            prefix.extent = prefix.prefill = None
            self._prefixes.remove(prefix)
        if self._reading is prefix:
            self._reading = None
