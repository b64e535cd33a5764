"""From documents and questions to token ids, with the tokens of each needle known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from random import Random

import numpy as np

from jobs.known.documents import Document, Kind, Lookup, Question, Span, finish, take, weave
from jobs.known.wording import Style
from pipeline.errors import JobError
from pipeline.prompts.tokens import load_tokens


@dataclass(frozen=True)
class Prompt:
    """A question's prompt. ids: int64 [tokens]; needles, places: token ranges [first, last).

    max_new_tokens is 0 for a prompt that only carries its document's lookups.
    """

    question: Question
    ids: np.ndarray
    needles: tuple[Span, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class TokenLookup:
    """A lookup in tokens: the ranges of the value's first sentence and of its second mention."""

    lookup: Lookup
    first: Span
    second: Span


@dataclass(frozen=True)
class Reading:
    """A document as the model gets it: one prompt for each question, all beginning with the same tokens.

    shared: tokens that all its prompts begin with, less than the shortest has.
    """

    document: Document
    prompts: tuple[Prompt, ...]
    lookups: tuple[TokenLookup, ...]
    shared: int


# Room behind a prompt: no answer is given more tokens.
MOST_ANSWER_TOKENS = 512


class Tokenizer:
    """A fast tokenizer with its chat template. Raises JobError for one that cannot tell tokens' places in the text."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        self._tokens = load_tokens(model, revision)
        self._tokenizer = self._tokens.tokenizer
        if not self._tokenizer.is_fast:
            raise JobError(f"--tokenizer {model}: a fast tokenizer (tokenizer.json) is needed to find needles by place")
        self.vocabulary = len(self._tokenizer)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def ids(self, text: str) -> np.ndarray:
        """int64 [tokens] of a text by itself."""
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def prompt(self, message: str, prefix: str) -> tuple[np.ndarray, np.ndarray, int]:
        """int64 ids, the end of each token in the rendered text, and where in it the message begins."""
        chat = self._tokens.has_chat_template
        # As a job asks: an answer that is cut inside its thinking would count as one that was not found.
        text = self._tokens.render_chat(message, {}, date.today(), thinking="off")
        begins = text.index(message)
        if prefix:
            text += ("" if chat else "\n") + prefix
        encoded = self._tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
        ends = np.array([last for _, last in encoded["offset_mapping"]])
        return np.array(encoded["input_ids"], dtype=np.int64), ends, begins

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without control tokens."""
        return self._tokens.decode(list(ids))


def tokens_of(span: Span, ends: np.ndarray) -> Span:
    """The tokens that hold the characters [first, last). ends: the last character of each token, ascending."""
    return int(np.searchsorted(ends, span[0], "right")), int(np.searchsorted(ends, span[1], "left")) + 1


def make_document(
    kind: Kind, length: int, index: int, style: Style, tokenizer: Tokenizer, questions: int, seed: int, essay: str = ""
) -> Document:
    """One document; the same arguments give the same text. Raises JobError where the facts alone pass `length`."""
    name = f"{kind.name}-{length}-{index}"
    rng = Random(f"{seed}/{style.name}/{name}")
    told = f"{name}-seed{seed}" if seed else name  # evaluations of several seeds may be put together
    recipe = kind.recipe(rng, style, questions, essay)
    longest = max((ask for ask, _ in recipe.asks), key=lambda ask: len(ask.text) + len(ask.prefix))
    frame = len(tokenizer.prompt(_message("", longest, style, kind.name), longest.prefix)[0])
    facts = sum(tokenizer.count([" " + fact.text for fact in recipe.facts])) if recipe.facts else 0
    title = sum(tokenizer.count([recipe.title])) if recipe.title else 0
    room = length - frame - facts - title
    if room < length // 8:
        raise JobError(
            f"{length} tokens are too few for a document of kind {kind.name!r} with {len(recipe.facts)} facts, which "
            f"take {facts} tokens"
        )
    filler = take(recipe.filler, room, tokenizer.count)
    while True:
        woven, spans = weave(filler, recipe.facts)
        text = recipe.title + woven.lstrip()
        asks, lookups = finish(recipe, spans, len(text) - len(woven))
        document = Document(told, kind.name, length, text, asks, lookups, carrier=longest.text)
        over = len(tokenizer.prompt(_message(text, longest, style, kind.name), longest.prefix)[0]) - length
        if over <= 0:
            return document
        # Tokens across a border may come out differently than in the pieces alone.
        filler = filler[: len(filler) - max(1, over // 32)]


def _message(text: str, question: Question, style: Style, kind: str) -> str:
    return f"{style.preamble(kind)}{text}\n\n{question.text}"


def read_prompts(document: Document, style: Style, tokenizer: Tokenizer) -> Reading:
    """The document's prompts and the token ranges of its needles."""
    asked = list(document.questions) or [Question("none", document.carrier, (), ())]
    before = len(style.preamble(document.kind))
    prompts = []
    lookups: tuple[TokenLookup, ...] = ()
    for question in asked:
        message = _message(document.text, question, style, document.kind)
        ids, ends, begins = tokenizer.prompt(message, question.prefix)
        shift = begins + before
        needles = tuple(tokens_of((first + shift, last + shift), ends) for first, last in question.needles)
        prompts.append(Prompt(question, ids, needles, _room_for(question, tokenizer)))
        if not lookups:
            lookups = tuple(
                TokenLookup(
                    lookup,
                    tokens_of((lookup.first[0] + shift, lookup.first[1] + shift), ends),
                    tokens_of((lookup.second[0] + shift, lookup.second[1] + shift), ends),
                )
                for lookup in document.lookups
            )
    return Reading(document, tuple(prompts), lookups, _shared([prompt.ids for prompt in prompts]))


def _room_for(question: Question, tokenizer: Tokenizer) -> int:
    """Output tokens: twice what the answer takes, so that a wordy model may say it too."""
    if question.task == "none":
        return 0
    answer = question.expected or ", ".join(question.references)
    return min(MOST_ANSWER_TOKENS, 32 + 2 * tokenizer.count([answer])[0])


def _shared(prompts: Sequence[np.ndarray]) -> int:
    shortest = min(len(ids) for ids in prompts) - 1
    first = prompts[0][:shortest]
    for ids in prompts[1:]:
        differ = np.flatnonzero(ids[: len(first)] != first)
        first = first[: differ[0]] if len(differ) else first
    return len(first)
