"""Batches from worker processes: documents, and the rows of them that are scored."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.train_demo_model.documents import OTHER, TARGET, Document, DocumentMaker, Span

AHEAD = 32
# After so long without a batch it is asked whether the processes that make them are alive.
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class BatchPlan:
    """tokens: of a batch. rows: scored of them. other_weight: of a row that is no target, against one that is.

    earlier: probability of a batch from an earlier, shorter stage. skip_to: largest position of a document whose
    positions jump.
    """

    tokens: int = 65_536
    rows: int = 12_288
    other_weight: float = 0.1
    earlier: float = 0.25
    skip_to: int = 34_000


@dataclass
class Batch:
    """What Reader.forward takes, as arrays or tensors; targets: how many of the first rows are targets."""

    arrays: tuple[Any, Any, Any, Any, Any]
    targets: int
    spans: list[list[Span]]

    @property
    def length(self) -> int:
        return int(self.arrays[0].shape[1])

    def to(self, device: torch.device) -> Batch:
        """A copy with tensors on `device`: ids, positions, rows, target int64, weight float32."""
        moved: list[Tensor] = []
        for array in self.arrays:
            tensor = torch.from_numpy(array)
            if device.type == "cuda":
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            moved.append(tensor if tensor.is_floating_point() else tensor.long())
        return Batch((moved[0], moved[1], moved[2], moved[3], moved[4]), self.targets, self.spans)


def make_batch(documents: Sequence[Document], plan: BatchPlan, draw: np.random.Generator) -> Batch:
    """Scored are all targets, up to `plan.rows`, and random other rows for the rest: a small language-model loss."""
    ids = np.stack([document.ids for document in documents]).astype(np.int32)
    mask = np.roll(np.stack([document.mask for document in documents]), -1, axis=1)
    mask[:, -1] = 0  # the last token has no next one
    following, kind = np.roll(ids, -1, axis=1).ravel(), mask.ravel()
    targets = np.flatnonzero(kind == TARGET)[: plan.rows]
    others = draw.integers(0, len(kind), plan.rows - len(targets))
    rows = np.concatenate([targets, others])
    other = np.where(kind[others] == OTHER, plan.other_weight / max(1, len(others)), 0.0)
    weight = np.concatenate([np.full(len(targets), 1 / max(1, len(targets))), other]).astype(np.float32)
    positions = np.stack([document.positions for document in documents])
    arrays = (ids, positions, rows.astype(np.int32), following[rows], weight)
    return Batch(arrays, len(targets), [document.spans for document in documents])


class BatchSource:
    """Batches of the current stage, made ahead by `workers` processes and moved to the device by a thread.

    lengths: document length of each stage. Start it before CUDA is: the workers are forks. What a worker makes depends
    on the seed and its number alone; how batches of several interleave, and when a stage begins, does not repeat.
    """

    def __init__(self, maker: DocumentMaker, lengths: Sequence[int], plan: BatchPlan, workers: int, seed: int) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        context = multiprocessing.get_context("fork")
        self._stage: Synchronized[int] = context.Value("i", 0)
        self._made: Any = context.Queue(AHEAD)
        self._moved: queue.Queue[Batch] = queue.Queue(4)
        self._processes = [
            context.Process(
                target=_work, args=(maker, lengths, plan, self._stage, self._made, worker, seed), daemon=True
            )
            for worker in range(workers)
        ]
        for process in self._processes:
            process.start()

    def start(self, device: torch.device) -> None:
        """Begin to move batches to `device`."""

        def move() -> None:
            while True:
                self._moved.put(self._made.get().to(device))

        threading.Thread(target=move, daemon=True).start()

    @property
    def stage(self) -> int:
        return self._stage.value

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage.value = stage

    def next(self) -> Batch:
        """The next batch, on the device. Raises RuntimeError if a worker has died: its share would be missing."""
        while True:
            try:
                return self._moved.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                dead = [process for process in self._processes if not process.is_alive()]
                if dead:
                    raise RuntimeError(
                        f"{len(dead)} of {len(self._processes)} processes that make documents have died (exit code "
                        f"{dead[0].exitcode}): see what they printed, or use fewer --workers if memory ran out"
                    ) from None

    def close(self) -> None:
        for process in self._processes:
            process.terminate()


def _work(
    maker: DocumentMaker,
    lengths: Sequence[int],
    plan: BatchPlan,
    stage: Synchronized[int],
    made: Any,
    worker: int,
    seed: int,
) -> None:
    rng, count = Random(seed * 1000 + worker), 0
    while True:
        current = stage.value
        if current and rng.random() < plan.earlier:
            current = rng.randrange(current)
        length = lengths[current]
        number = (seed + 1) * 10**8 + worker * 10**6 + count
        documents = maker.batch(length, max(1, plan.tokens // length), number, plan.skip_to)
        made.put(make_batch(documents, plan, np.random.default_rng(worker * 10**6 + count)))
        count += 1
