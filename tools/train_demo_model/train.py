"""Training within a time budget: stages of growing document length, one learning-rate decay over all of them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.train_demo_model.batches import Batch, BatchPlan, BatchSource, make_batch
from tools.train_demo_model.documents import SHORTEST, DocumentMaker
from tools.train_demo_model.model import Reader, Shape
from tools.train_demo_model.optimizer import Muon
from tools.train_demo_model.tokenizer import vocabulary_size

WARM_UP_STEPS = 60
REPORT_STEPS = 25


@dataclass(frozen=True)
class Settings:
    """A training run. stages: (document length, share of the time at which the stage ends).

    decay_from: share of the time from which the learning rates fall to 1%. paragraphs: share of the facts that open a
    paragraph of their own. check_lengths: lengths of the documents that recall is measured on, teacher-forced.
    """

    tokenizer: Path
    output: Path
    seconds: float = 400.0
    seed: int = 0
    stages: tuple[tuple[int, float], ...] = ((512, 0.12), (2048, 0.32), (8192, 0.6), (16_384, 0.85), (32_768, 1.0))
    paragraphs: float = 0.3
    shape: Shape = field(default_factory=Shape)
    plan: BatchPlan = field(default_factory=BatchPlan)
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.02
    decay_from: float = 0.4
    workers: int = 14
    check_every: float = 40.0
    check_lengths: tuple[int, ...] = (512, 2048, 8192, 16_384, 32_768)
    check_batches: int = 2
    pool: float = 1.0


def train(settings: Settings) -> dict[str, Any]:
    """Train, exporting to settings.output as it goes. Returns metrics, which are also in output/training.json."""
    begun = time.time()
    torch.manual_seed(settings.seed)
    settings.output.mkdir(parents=True, exist_ok=True)
    maker = DocumentMaker(settings.tokenizer, settings.paragraphs, seed=0, pool=settings.pool)
    lengths = [length for length, _ in settings.stages]
    source = BatchSource(maker, lengths, settings.plan, settings.workers, settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(**asdict(settings.shape) | {"vocabulary": vocabulary_size(settings.tokenizer)})
    model = Reader(shape).to(device)
    optimizer = make_optimizer(model, settings)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.compile_pieces()
    source.start(device)
    trainer = Trainer(settings, model, optimizer, source, Checks(settings, maker, device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters on {device}, ready after {time.time() - begun:.0f} s", flush=True)
    try:
        with attention_backends(device):
            trainer.run()
    finally:
        source.close()
    metrics = {
        "parameters": parameters,
        "steps": trainer.steps,
        "tokens": sum(trainer.tokens.values()),
        "tokens_by_length": trainer.tokens,
        "seconds": settings.seconds,
        "seconds_in_all": time.time() - begun,
        "seed": settings.seed,
        "losses": trainer.losses,
        "recall": trainer.recall,
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
    }
    (settings.output / "training.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def make_optimizer(model: Reader, settings: Settings) -> Muon:
    matrices = [parameter for block in model.blocks for parameter in block.parameters() if parameter.ndim == 2]
    known = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return Muon(matrices, rest, (settings.muon_rate, settings.adam_rate), settings.weight_decay)


@contextlib.contextmanager
def attention_backends(device: torch.device) -> Iterator[None]:
    """cuDNN's attention on a GPU: with grouped heads faster than flash attention from 2K tokens on."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        yield


class Checks:
    """Documents that no batch holds, and how many of their targets the model predicts in full."""

    def __init__(self, settings: Settings, maker: DocumentMaker, device: torch.device) -> None:
        draw = np.random.default_rng(settings.seed)
        self._device = device
        self._batches: dict[int, list[Batch]] = {}
        for length in settings.check_lengths:
            count = max(1, settings.plan.tokens // length)
            made = [maker.batch(length, count, 7 + number) for number in range(settings.check_batches)]
            self._batches[length] = [make_batch(documents, settings.plan, draw) for documents in made]

    def recall(self, model: nn.Module, longest: int) -> dict[str, dict[str, float]]:
        """Share of targets that are right in every token, by length and kind, for documents of up to `longest`.

        Not under no_grad, which torch.compile would compile everything once more for.
        """
        found: dict[str, dict[str, float]] = {}
        for length, batches in self._batches.items():
            if length > longest:
                continue
            right: dict[str, list[bool]] = {}
            for batch in batches:
                moved = batch.to(self._device)
                good = model(*moved.arrays)[1][: batch.targets].cpu().numpy()
                known = dict(zip(batch.arrays[2][: batch.targets].tolist(), good.tolist(), strict=True))
                for place, spans in enumerate(batch.spans):
                    for span in spans:
                        rows = range(place * length + span.first - 1, place * length + span.last - 1)
                        if all(row in known for row in rows):
                            right.setdefault(span.kind, []).append(all(known[row] for row in rows))
            found[str(length)] = {kind: round(float(np.mean(hits)), 4) for kind, hits in sorted(right.items())}
        return found


class Trainer:
    """The loop. losses: (seconds, loss, share of targets' tokens right) every few steps. recall: the last check's."""

    def __init__(self, settings: Settings, model: Reader, optimizer: Muon, source: BatchSource, checks: Checks) -> None:
        self._settings, self._model, self._optimizer = settings, model, optimizer
        self._source, self._checks = source, checks
        self.steps = 0
        self.tokens: dict[int, int] = {}
        self.losses: list[tuple[float, float, float]] = []
        self.recall: dict[str, dict[str, float]] = {}
        self._seen: list[tuple[Tensor, Tensor]] = []

    def run(self) -> None:
        """Train until the time is up, the compilation of the first step apart; then check and export."""
        settings = self._settings
        self._backward(self._source.next())
        self._model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.time()
        next_check = settings.check_every
        while (seconds := time.time() - begun) < settings.seconds:
            share = seconds / settings.seconds
            self._source.stage = min(len(settings.stages) - 1, sum(share >= end for _, end in settings.stages))
            self._step(share)
            if len(self._seen) >= REPORT_STEPS:
                self._report(seconds)
            if seconds > next_check:
                self._check(seconds)
                next_check = time.time() - begun + settings.check_every
        self._report(settings.seconds)
        self._source.stage = len(settings.stages) - 1
        self._check(settings.seconds)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, good = self._model(*batch.arrays)
        loss.backward()
        return loss.detach(), good[: batch.targets].float().mean()

    def _step(self, share: float) -> None:
        batch = self._source.next()
        self._seen.append(self._backward(batch))
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0, foreach=True)
        fall = min(1.0, max(0.01, (1 - share) / (1 - self._settings.decay_from)))
        warm = min(1.0, (self.steps + 1) / WARM_UP_STEPS)
        self._optimizer.step(warm * fall, min(0.95, 0.85 + self.steps / 3000))
        self._model.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens[batch.length] = self.tokens.get(batch.length, 0) + batch.arrays[0].numel()

    def _report(self, seconds: float) -> None:
        if not self._seen:
            return
        loss, right = torch.stack([torch.stack(pair) for pair in self._seen]).mean(0).tolist()
        self._seen.clear()
        self.losses.append((round(seconds, 1), round(loss, 4), round(right, 4)))
        if self.steps % 200 < REPORT_STEPS:
            print(f"{seconds:6.1f} s, step {self.steps}: loss {loss:.3f}, target tokens right {right:.3f}", flush=True)

    def _check(self, seconds: float) -> None:
        stages = self._settings.stages
        done = seconds >= self._settings.seconds
        longest = max(length for length, _ in stages) if done else 4 * stages[self._source.stage][0]
        self.recall = self._checks.recall(self._model, longest)
        for length, kinds in self.recall.items():
            told = ", ".join(f"{kind} {share:.2f}" for kind, share in kinds.items())
            print(f"{seconds:6.1f} s, {length} tokens: {told}", flush=True)
        self._model.export(self._settings.output, self._settings.tokenizer)


def parse_stages(text: str) -> tuple[tuple[int, float], ...]:
    """ "512:0.12,2048:1" to stages. Raises ValueError."""
    stages = tuple((int(part.split(":")[0]), float(part.split(":")[1])) for part in text.split(","))
    if not _rising([share for _, share in stages]) or stages[-1][1] != 1.0:
        raise ValueError(f"the shares of the stages must rise to 1, got {text}")
    if min(length for length, _ in stages) < SHORTEST:
        raise ValueError(f"documents have at least {SHORTEST} tokens, got {text}")
    return stages


def _rising(values: Sequence[float]) -> bool:
    return all(low < high for low, high in pairwise(values))
