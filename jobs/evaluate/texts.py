"""Stretches of plain text, along which the predictions of arms are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from jobs.evaluate.rows import SCHEMA
from jobs.known.documents import take
from jobs.known.prompts import Tokenizer
from jobs.known.reader import Answer, Reader, Reference, likelihood
from jobs.known.report import essay_filler
from jobs.known.results import Row, row_of
from pipeline.errors import JobError

# Prompts of plain text end with a whole block, whatever an arm's block size is.
BLOCK = 256
# Tokens behind a text's prompt along which predictions are compared, and every how many tokens inside.
BEHIND, EVERY = 512, 8


@dataclass(frozen=True)
class Text:
    """A stretch of plain text. ids: int64 [prompt_tokens + BEHIND]."""

    name: str
    length: int
    ids: np.ndarray
    prompt_tokens: int
    kind: str = "text"

    @property
    def places(self) -> range:
        """Positions inside the prompt whose predictions are compared: every EVERY-th of the last three quarters."""
        return range(self.prompt_tokens // 4, self.prompt_tokens - 1, EVERY)


def make_texts(length: int, count: int, tokenizer: Tokenizer, seed: int, essay: str) -> list[Text]:
    """Stretches of an essay, spread evenly over it, or of synthetic sentences where it is empty.

    The prompts are whole blocks. Raises JobError where the essay is too short.
    """
    prompt_tokens = length // BLOCK * BLOCK
    wanted = prompt_tokens + BEHIND
    if prompt_tokens == 0:
        raise JobError(f"task text needs --lengths of {BLOCK} tokens or more, got {length}")
    texts = []
    ids = tokenizer.ids(essay) if essay else np.zeros(0, dtype=np.int64)
    if essay and len(ids) < wanted:
        raise JobError(f"--essay has {len(ids):,} tokens, task text takes {wanted:,} at {length:,} tokens: give more")
    for index in range(count):
        name = f"text-{length}-{index}" + (f"-seed{seed}" if seed else "")
        if essay:
            # Another seed begins a part of a step further on.
            step = (len(ids) - wanted) / count
            first = int(step * (index + Random(seed).random() * bool(seed)))
            part = ids[first : first + wanted]
        else:
            filler = essay_filler(Random(f"{seed}/{name}"))
            part = tokenizer.ids("".join(take(filler, wanted + BLOCK, tokenizer.count)))[:wanted]
        texts.append(Text(name, length, part, prompt_tokens))
    return texts


@torch.inference_mode()
def read_text(reader: Reader, text: Text, reference: Reference) -> tuple[Answer, Answer]:
    """What the reader's arm predicts along a text: inside the prompt, and behind it, where an answer would be."""
    fill = not reference
    length = text.prompt_tokens
    ids = torch.from_numpy(text.ids).to(reader.device)
    behind_places = range(length, len(text.ids) - 1)
    with reader.room(length) as document, reader.room(len(behind_places)) as place:
        assert document is not None, "the arena is empty, and holds the longest text"
        assert place is not None, "as much is free again"
        begun = reader.now()
        inside = reader.run(reader.prefill(text.ids[:length], document), text.places)
        seconds = reader.now() - begun
        # As what is decoded: densely, to the keys and values that the arm left.
        behind = reader.behind(document, length, text.ids[length:-1], place, every_token=True)

    def answer(part: str, logits: torch.Tensor, places: Sequence[int]) -> Answer:
        found = Answer(reader.arm, None, length, density=reader.density(length), prefill_seconds=seconds)
        found.kl, found.top1 = reader.compare(part, logits, reference, fill)
        found.nll, _ = likelihood(logits, ids[torch.tensor(places, device=reader.device) + 1])
        return found

    return answer("inside", inside, text.places), answer("behind", behind, behind_places)


def text_rows(reader: Reader, text: Text, reference: Reference) -> list[Row]:
    """The two rows of a text under the reader's arm."""
    of_text: Row = dict.fromkeys(SCHEMA.names) | {"document": text.name, "kind": text.kind, "length": text.length}
    return [
        of_text | row_of(answer, reader.precision, str) | {"task": f"text {part}"}
        for part, answer in zip(("inside", "behind"), read_text(reader, text, reference), strict=True)
    ]
