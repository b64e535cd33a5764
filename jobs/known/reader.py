"""Documents read by the product's engine as its jobs read them: a document once, and what is asked behind it.

All of a document's prompts begin with the same tokens. These are read once, as a prompt of their own length; what
follows, each question has for itself, and reads it as a job does (pipeline.engine.config.SharedPrompt). The answers are
decoded in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.known.prompts import Prompt, Reading, TokenLookup
from pipeline.engine import EngineConfig, EngineError
from pipeline.engine.kv.arena import Extent, aligned
from pipeline.engine.model.loading import context_limit, load_runner, stop_token_ids
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.prefix import Prefix
from pipeline.engine.run.batch import IDLE, NOT_FINITE, DecodeBatch, RowStart
from pipeline.engine.run.decode import DecodeRunner, StepKey, batch_bucket, group_bucket
from pipeline.engine.run.prefill import Prefill, attention_plan, chunk_size
from pipeline.engine.run.tail import TailPrefill
from stem_core.config import StemConfig
from stem_core.context import Select

# Logits [rows, V] that are compared in float32 at once.
SLICE_ROWS = 256
# Questions that are answered as one batch, where so many fit, and the tokens for which each has room on average.
MOST_ROWS = 16
ROW_TOKENS = 1024
# Share of a GPU's free memory for keys and values; the rest is for chunks, logits and what is compared.
KV_SHARE = 0.5


@dataclass(frozen=True)
class Arm:
    """One way to attend. config None: dense. select: what chooses the blocks in place of the config's estimator.

    other_chunks: prefill in shorter chunks, which change nothing but the rounding.
    """

    name: str
    config: StemConfig | None
    select: Select | None = None
    other_chunks: bool = False


@dataclass
class Answer:
    """What came of one question, lookup or stretch of text under an arm.

    reading: None for a text. token_ids: the greedy answer to a question. correct: of a lookup, that every
    token of the value came first. top1: share of a lookup's tokens that came first; along text, share of positions at
    which the arm and dense put the same token first. kl: KL(dense || arm) in nats, mean over a lookup's tokens or a
    text's positions; of a question at the first token. nll: of a lookup's or text's own tokens, mean, in nats.
    density: computed share of the causal blocks, in the sparsest layer and over all.
    prefill_seconds: of the document, shared by all its questions.
    """

    arm: Arm
    reading: Reading | None
    prompt_tokens: int
    prompt: Prompt | None = None
    lookup: TokenLookup | None = None
    token_ids: list[int] = field(default_factory=list)
    correct: bool = False
    top1: float | None = None
    kl: float | None = None
    nll: float | None = None
    density: tuple[float, float] = (1.0, 1.0)
    prefill_seconds: float = 0.0
    answer_seconds: float = 0.0


# The dense logits of one document, [rows, V] by what they belong to, that the other arms are compared with.
Reference = dict[object, Tensor]


def comparison(logits: Tensor, dense: Tensor) -> tuple[float, float]:
    """Of logits [rows, V]: mean KL(dense || arm) in nats, share of rows with the same most likely token."""
    kl = same = 0.0
    for mine, theirs in zip(logits.split(SLICE_ROWS), dense.split(SLICE_ROWS), strict=True):
        p, q = (x.float().log_softmax(-1) for x in (theirs, mine))
        # A row's sum may come out below 0 by rounding.
        kl += float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).clamp(min=0).sum())
        same += float((mine.argmax(-1) == theirs.argmax(-1)).sum())
    return kl / len(logits), same / len(logits)


def likelihood(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Of logits [rows, V] and the tokens int64 [rows] that came: mean negative log-likelihood, share that is first."""
    parts = zip(logits.split(SLICE_ROWS), targets.split(SLICE_ROWS), strict=True)
    nll = sum(float(F.cross_entropy(mine.float(), wanted, reduction="sum")) for mine, wanted in parts)
    return nll / len(logits), float((logits.argmax(-1) == targets).float().mean())


class Reader:
    """A model in one precision, with room for a document of `longest` tokens, an answer included, and its questions.

    runner: a model that is loaded already; None loads it. Raises EngineError for a model or precision that cannot run
    here.
    """

    def __init__(self, config: EngineConfig, longest: int, runner: ModelRunner | None = None) -> None:
        self._config = config
        self._runner = load_runner(config) if runner is None else runner
        self.device, self.precision = self._runner.device, self._runner.precision.name
        self.limit, self.vocabulary = context_limit(self._runner.model.config), self._runner.vocabulary
        self._longest = longest
        self._stop_ids = stop_token_ids(self._runner.model)
        self._arm: Arm | None = None

    def allocate(self, share: float) -> None:
        """Make the arena, in a share of what memory is free. Raises EngineError if it does not fit."""
        # The tokens behind a document are never more than all of it.
        tokens = aligned(self._longest) + max(aligned(self._longest), MOST_ROWS * ROW_TOKENS)
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0] * KV_SHARE * share
            if self._runner.bytes_per_token() * tokens + self._runner.state_bytes(MOST_ROWS + 1) > free:
                raise EngineError(
                    f"keys and values of {tokens:,} tokens in {self.precision} do not fit {self.device}: give shorter "
                    "--lengths or fewer values of --precision"
                )
        self._arena = self._runner.new_arena(tokens, documents=MOST_ROWS + 1)
        self._batch = DecodeBatch(MOST_ROWS, self.device, self._runner.vocabulary)
        on_gpu = self.device.type == "cuda"
        self._decode = DecodeRunner(self._runner, self._arena, self._batch, self._longest, on_gpu)

    def use(self, arm: Arm) -> None:
        """Switch to an arm's attention. Raises EngineError for blocks that the precision cannot take."""
        self._runner.attend(arm.config)
        self._arm = arm

    @torch.inference_mode()
    def read(self, reading: Reading, reference: Reference) -> list[Answer]:
        """Answers to all questions and lookups of a document under the arm in use.

        reference: filled where it is empty, else compared with.
        """
        fill = not reference
        prompts = reading.prompts
        tokens = Prefix.of(prompts[0].ids[: reading.shared], None, len(prompts), states=False).tokens
        lookups = sorted((item for item in reading.lookups if item.second[1] <= tokens), key=lambda item: item.second)
        with self.room(tokens) as document:
            assert document is not None, "the arena is empty, and holds the longest document"
            prefill = self.prefill(prompts[0].ids[:tokens], document)
            begun = self.now()
            logits = self.run(prefill, [place - 1 for item in lookups for place in range(*item.second)])
            seconds = self.now() - begun
            answers = []
            values_of = logits.split([item.second[1] - item.second[0] for item in lookups]) if lookups else ()
            for item, mine in zip(lookups, values_of, strict=True):
                answer = Answer(self.arm, reading, len(prompts[0].ids), lookup=item)
                answer.kl, _ = self.compare(item, mine, reference, fill)
                values = torch.from_numpy(prompts[0].ids[slice(*item.second)]).to(self.device)
                answer.nll, answer.top1 = likelihood(mine, values)
                answer.correct = answer.top1 == 1.0
                answers.append(answer)
            asked = [prompt for prompt in prompts if prompt.max_new_tokens]
            while asked:
                found = self._ask(reading, document, tokens, asked, reference, fill)
                answers += found
                asked = asked[len(found) :]
        density = self.density(tokens)
        for answer in answers:
            answer.density, answer.prefill_seconds = density, seconds
        return answers

    @property
    def arm(self) -> Arm:
        """The arm in use."""
        assert self._arm is not None, "use() an arm first"
        return self._arm

    def density(self, prompt_tokens: int) -> tuple[float, float]:
        """Computed share of the causal blocks under the arm in use: of the sparsest layer, and over all layers."""
        plan = attention_plan(self._runner, prompt_tokens)
        return min(plan.density_by_layer), plan.density

    @contextmanager
    def room(self, tokens: int) -> Iterator[Extent | None]:
        """A place for so many tokens until the end of the context; None where none is that large."""
        place = self._arena.extents.allocate(tokens)
        try:
            yield place
        finally:
            if place is not None:
                self._arena.release(place)

    def prefill(self, ids: np.ndarray, place: Extent) -> Prefill:
        """A prefill of a document, int64 [tokens], under the arm in use."""
        asked = self._config.chunk_tokens
        if self.arm.other_chunks:
            asked = min(asked, len(ids)) * 3 // 5
        chunk = chunk_size(asked, self.arm.config)
        return Prefill(self._runner, self._arena, place, ids, 0, chunk, every_row=True, select=self.arm.select)

    def run(self, prefill: Prefill, places: Sequence[int]) -> Tensor:
        """Prefill all of it. Returns logits [len(places), V] at `places`, ascending, in the model's dtype."""
        found: list[Tensor] = []
        waiting = list(places)
        while not prefill.done:
            count = int(np.searchsorted(waiting, prefill.start + prefill.chunk_tokens))
            here, waiting = waiting[:count], waiting[count:]
            logits = prefill.step(here or None)
            assert logits is not None
            if here:
                found.append(logits)
        return torch.cat(found) if found else torch.empty(0, self._runner.vocabulary, device=self.device)

    def behind(
        self, document: Extent, tokens: int, ids: np.ndarray, place: Extent, every_token: bool = False
    ) -> Tensor:
        """Read int64 [L] into a place of their own, behind a document of so many tokens. Returns the last one's logits
        [1, V], or [L, V] of each."""
        tail = TailPrefill(self._runner, self._arena, document, tokens, place, ids, self._longest)
        found = []
        while not tail.done:
            found.append(tail.step(every_token))
        return torch.cat(found) if every_token else found[-1]

    def compare(self, key: object, logits: Tensor, reference: Reference, fill: bool) -> tuple[float, float]:
        """`comparison` of the logits with the reference's of that key; fill: they are the reference."""
        if fill:
            reference[key] = logits
        return comparison(logits, reference[key].to(logits.device))

    def _ask(
        self,
        reading: Reading,
        document: Extent,
        tokens: int,
        prompts: Sequence[Prompt],
        reference: Reference,
        fill: bool,
    ) -> list[Answer]:
        """Answers to as many questions as there is room for, at least one, decoded together."""
        begun = self.now()
        answers: list[Answer] = []
        with ExitStack() as held:
            for row, prompt in enumerate(prompts[:MOST_ROWS]):
                tail = prompt.ids[tokens:]
                place = held.enter_context(self.room(len(tail) + prompt.max_new_tokens))
                if place is None:
                    break
                logits = self.behind(document, tokens, tail, place)
                answer = Answer(self.arm, reading, len(prompt.ids), prompt)
                answer.kl, _ = self.compare(prompt.question, logits, reference, fill)
                answers.append(answer)
                self._batch.begin(
                    row,
                    RowStart(
                        place, len(prompt.ids), prompt.max_new_tokens, 0, self._stop_ids, 0.0, 1.0,
                        prefix_start=document.start, prefix_tokens=tokens, bound=tokens,
                    ),
                )  # fmt: skip
                self._batch.advance(logits, row, sampled=False)
            self._decode_all(reading, answers)
        for answer in answers:
            answer.answer_seconds = (self.now() - begun) / len(answers)
        return answers

    def _decode_all(self, reading: Reading, answers: Sequence[Answer]) -> None:
        """Fill the answers' token_ids, from their first tokens on."""
        for step in self._steps(len(answers)):
            for answer, token in zip(answers, step, strict=True):
                if token == NOT_FINITE:
                    raise EngineError(f"{self.arm.name}, {reading.document.name}: logits that are not finite")
                answer.token_ids += [] if token == IDLE else [token]

    def _steps(self, rows: int) -> Iterator[list[int]]:
        """The tokens of each row, step by step, until all have stopped."""
        for row in range(rows, self._batch.rows):
            self._batch.clear(row)
        key = StepKey(batch_bucket(rows, self._batch.rows), sampled=False, shared=group_bucket(rows))
        step = self._batch.report[:rows].tolist()
        while any(token != IDLE for token in step):
            yield step
            self._decode.run(key)
            step = self._batch.report[:rows].tolist()

    def now(self) -> float:
        """Seconds, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
