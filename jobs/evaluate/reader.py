"""Runs documents through a model under an arm: prefill once, answer all questions, keep what the comparison needs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluate.answers import Answer, Entry, entries_of
from jobs.evaluate.arms import Arm
from jobs.evaluate.attention import Answers, Chunk, DocumentKeys, TailKeys
from jobs.evaluate.probe import Probe, merge_probes
from jobs.evaluate.prompts import Prompt, Reading
from pipeline.engine.model.loading import context_limit

# Tokens of the dense answer along which an arm's predictions are compared with the dense ones, at most.
COMPARED_TOKENS = 16


class Reader:
    """A model prepared by `prepare_model`, on its device.

    stop_ids end an answer. chunk_tokens: tokens of a prompt that go through the model at once. cached_tokens: of
    documents that are held at the same time in float32, at most, but always those of one.
    """

    def __init__(self, model: nn.Module, stop_ids: Sequence[int], chunk_tokens: int, cached_tokens: int) -> None:
        self.model = model
        self.cached_tokens = cached_tokens
        self.device = next(model.parameters()).device
        self.limit = context_limit(model.config)
        self.layers = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator, arg-type]
        self._stop_ids = frozenset(stop_ids)
        self._chunk = chunk_tokens

    @torch.inference_mode()
    def read(
        self,
        readings: Sequence[Reading],
        arms: Sequence[Arm],
        dense: dict[tuple[str, str], Answer] | None,
        probed: frozenset[str],
    ) -> list[Answer]:
        """Answers to all questions and lookups of some documents under each of some arms.

        dense: the dense answers by key, None in the dense run itself. probed: names of the documents to look into.
        """
        answers = []
        for group in self._groups([entry for arm in arms for entry in entries_of(readings, arm)]):
            answers += self._read_group(group, dense, probed)
        return answers

    def _groups(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        """Entries in portions whose documents fit the cache together."""
        groups: list[list[Entry]] = [[]]
        for entry in entries:
            longest = max(entry.length, *(other.length for other in groups[-1]), 0)
            if groups[-1] and longest * (len(groups[-1]) + 1) > self.cached_tokens:
                groups.append([])
            groups[-1].append(entry)
        return groups

    def _read_group(
        self,
        entries: Sequence[Entry],
        dense: dict[tuple[str, str], Answer] | None,
        probed: frozenset[str],
    ) -> list[Answer]:
        per_entry = max(len(entry.prompts) for entry in entries)
        tail = max(len(prompt.ids) - entry.shared for entry in entries for prompt in entry.prompts)
        new = max(prompt.max_new_tokens for entry in entries for prompt in entry.prompts)
        shared = torch.tensor([entry.shared for entry in entries], device=self.device)
        documents = DocumentKeys(len(entries), max(entry.length for entry in entries), shared)
        tails = TailKeys(len(entries) * per_entry, tail + new + COMPARED_TOKENS, self.device)
        logits: list[Tensor | None] = [None] * (len(entries) * per_entry)
        answers: dict[int, Answer] = {}
        lookups: list[Answer] = []
        for index, entry in enumerate(entries):
            documents.entry = index
            begun = time.perf_counter()
            probe = self._prefill(entry, documents, lookups, probed)
            seconds = self._seconds_since(begun)
            for slot, prompt in enumerate(entry.prompts):
                row = index * per_entry + slot
                answer = answers[row] = Answer(entry.arm, entry.reading, prompt, prefill_seconds=seconds)
                logits[row] = self._ask(entry, prompt, documents, answer, probe)
                tails.take(row, documents, entry.shared, len(prompt.ids))
        if len(entries) * max(entry.length for entry in entries) <= self.cached_tokens:
            documents.widen()
        some = next(row for row in logits if row is not None)
        first = torch.stack([torch.zeros_like(some) if row is None else row for row in logits])
        begun = time.perf_counter()
        answering = Answers(documents, tails)
        if dense is not None:
            self._compare(answering, first, answers, dense)
        self._decode(answering, first, answers, keep=dense is None)
        seconds = self._seconds_since(begun) / len(answers)
        for answer in answers.values():
            answer.answer_seconds = seconds
        return lookups + [answer for answer in answers.values() if answer.prompt.max_new_tokens]

    def _seconds_since(self, begun: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun

    def _prefill(
        self, entry: Entry, documents: DocumentKeys, lookups: list[Answer], probed: frozenset[str]
    ) -> Probe | None:
        """The entry's shared tokens; appends what became of its lookups."""
        prompt, arm, probe = entry.prompts[0], entry.arm, None
        if entry.reading.document.name in probed and entry.shared:
            probe = Probe([(lookup.first, lookup.second[0] - 1) for lookup in entry.lookups])
        expected: dict[int, int] = {}
        inside = [lookup for lookup in entry.lookups if lookup.second[1] <= entry.shared]
        for lookup in inside:
            expected |= {place - 1: int(prompt.ids[place]) for place in range(*lookup.second)}
        right: dict[int, bool] = {}
        pieces: list[Probe] = []
        begun = time.perf_counter()
        chunk = max(arm.block_size, self._chunk // arm.block_size * arm.block_size)
        for start in range(0, entry.shared, chunk):
            end = min(start + chunk, entry.shared)
            rows = sorted(place for place in expected if start <= place < end)
            here = None
            if probe is not None:
                here = Probe([needle for needle in probe.needles if start <= needle[1] < end], rows=end - start)
                pieces.append(here)
            logits = self._forward(
                prompt.ids[start:end], documents, start, Chunk(arm, len(prompt.ids), start, here), rows or [end - 1]
            )
            best = logits.argmax(-1).tolist()
            right |= {place: guess == expected[place] for place, guess in zip(rows, best, strict=True)} if rows else {}
        seconds = self._seconds_since(begun)
        merged = merge_probes(pieces, self.layers) if probe is not None else None
        for lookup in inside:
            answer = Answer(arm, entry.reading, prompt, lookup, prefill_seconds=seconds)
            answer.correct = all(right[place - 1] for place in range(*lookup.second))
            if merged is not None:
                answer.mass = answer.document_mass = [merged.mass[layer] for layer in range(self.layers)]
                order = [needle for piece in pieces for needle in piece.needles]
                wanted = order.index((lookup.first, lookup.second[0] - 1))
                answer.needles = [merged.kept[layer][wanted] for layer in range(self.layers)]
            lookups.append(answer)
        return merged

    def _ask(
        self, entry: Entry, prompt: Prompt, documents: DocumentKeys, answer: Answer, document: Probe | None
    ) -> Tensor:
        """The prompt's tokens behind the shared ones. Returns float32 logits [V] of its last token."""
        last = len(prompt.ids) - 1
        probe = None
        if document is not None:
            probe = Probe([(needle, last) for needle in prompt.needles])
        chunk = Chunk(entry.arm, len(prompt.ids), entry.shared, probe)
        logits = self._forward(prompt.ids[entry.shared :], documents, entry.shared, chunk, [last])
        if probe is not None and document is not None:
            layers = range(self.layers)
            answer.mass = [probe.mass.get(layer, 1.0) for layer in layers]
            answer.document_mass = [document.mass[layer] for layer in layers]
            if prompt.needles:
                answer.needles = [float(np.mean(probe.kept.get(layer, [1.0]))) for layer in layers]
        return logits[0]

    def _forward(
        self, ids: np.ndarray, documents: DocumentKeys, start: int, chunk: Chunk, rows: Sequence[int]
    ) -> Tensor:
        """One chunk of a prompt. Returns float32 logits [len(rows), V] at the positions `rows`."""
        documents.seen = start
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        wanted = torch.tensor([row - start for row in rows], device=self.device)
        out = self.model(
            input_ids=torch.from_numpy(ids)[None].to(self.device),
            position_ids=positions,
            past_key_values=documents,
            use_cache=True,
            logits_to_keep=wanted,
            evaluation=chunk,
        )
        return out.logits[0].float()

    def _extend(self, answering: Answers, tokens: Tensor) -> Tensor:
        """Add tokens int64 [rows, L] to every row. Returns float32 logits [rows, L, V]."""
        tails = answering.tails
        entries = len(answering.documents.shared)
        shared = answering.documents.shared.repeat_interleave(len(tails.tokens) // entries)
        positions = (shared + tails.tokens)[:, None] + torch.arange(tokens.shape[1], device=self.device)
        out = self.model(
            input_ids=tokens, position_ids=positions, past_key_values=tails, use_cache=True, evaluation=answering
        )
        tails.tokens += tokens.shape[1]
        return out.logits.float()

    def _compare(
        self, answering: Answers, first: Tensor, answers: dict[int, Answer], dense: dict[tuple[str, str], Answer]
    ) -> None:
        """Fill in first_kl and answer_kl: this arm's predictions along the dense answers. Leaves the tails as found."""
        asked = answering.tails.tokens.clone()
        known = {row: dense[answer.key] for row, answer in answers.items() if answer.key in dense}
        forced = torch.zeros(len(first), COMPARED_TOKENS - 1, dtype=torch.int64, device=self.device)
        for row, answer in known.items():
            ids = answer.token_ids[: COMPARED_TOKENS - 1]
            forced[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        longest = max((len(answer.log_probs) for answer in known.values() if answer.log_probs is not None), default=0)
        steps = [first]
        for part in forced[:, : longest - 1].split(4, dim=1) if longest > 1 else ():
            steps += self._extend(answering, part).unbind(1)
        for row, answer in known.items():
            if answer.log_probs is None:
                continue
            theirs = answer.log_probs.to(self.device)
            mine = F.log_softmax(torch.stack([step[row] for step in steps[: len(theirs)]]), -1)
            divergence = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1).tolist()
            answers[row].first_kl, answers[row].answer_kl = divergence[0], float(np.mean(divergence))
        answering.tails.tokens.copy_(asked)

    def _decode(self, answering: Answers, first: Tensor, answers: dict[int, Answer], keep: bool) -> None:
        """Greedy answers of all rows together, each until it stops or has its number of tokens."""
        open_rows = {row: answer for row, answer in answers.items() if answer.prompt.max_new_tokens}
        logits = first
        kept: list[Tensor] = []
        while open_rows:
            if keep and len(kept) < COMPARED_TOKENS:
                kept.append(F.log_softmax(logits, -1).cpu())
            tokens = logits.argmax(-1)
            for (row, answer), token in zip(list(open_rows.items()), tokens[list(open_rows)].tolist(), strict=True):
                answer.token_ids.append(token)
                if token in self._stop_ids or len(answer.token_ids) == answer.prompt.max_new_tokens:
                    del open_rows[row]
            if open_rows:
                logits = self._extend(answering, tokens[:, None])[:, 0]
        for row, answer in answers.items():
            if keep and answer.token_ids:
                answer.log_probs = torch.stack([step[row] for step in kept[: len(answer.token_ids)]])
