"""A model's tokenizer, with a second way to encode: as data, in which control tokens do not exist."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

import numpy as np

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.model_files import is_gguf, source
from pipeline.prompts.thinking import CHANNEL, Answer, markers_of, may_think, split_answer, template_switches

# The function by which chat templates ask for the date, and the codes of its formats: %d, %-d, %B.
CLOCK = "strftime_now"
FORMAT_CODE = re.compile(r"%[-_0^#]?[A-Za-z]")
TOKENIZER_FILES = "The model needs its tokenizer's files beside config.json: tokenizer.json with tokenizer_config.json"


def load_tokens(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Tokens:
    """The tokenizer of a model folder, .gguf file or hub id. Raises JobError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    try:
        place, more = source(model)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code, **more)
        added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        # Where there are no files, transformers makes an empty tokenizer of some types.
        problem = "" if len(tokenizer) > len(added) else "has no vocabulary"
    except Exception as error:  # transformers raises many kinds for a missing or damaged tokenizer
        problem = f"cannot be loaded: {one_line(error)}"
    if problem:
        advice = "Use the model as a folder of transformers instead" if is_gguf(model) else TOKENIZER_FILES
        raise JobError(f"--model {model}: its tokenizer {problem}. {advice}")
    return Tokens(tokenizer)


class Tokens:
    """Encodes templates with control tokens and documents without.

    A control token is every added token that is special or written in brackets (<...>, [...]); added tokens that are
    plain words or white space are part of the language. Works over `tokenizers` backends and over Python tokenizers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.control = {i: str(token) for i, token in added.items() if token.special or _bracketed(str(token))}
        self.control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        # Unknown characters give the unknown token; that is no control over anything.
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._forbidden = np.array(sorted(i for i in self.control if i != unknown), dtype=np.int64)
        strings = sorted({s for s in self.control.values() if s}, key=len, reverse=True)
        self._swallow_right = {str(token) for token in added.values() if token.rstrip}
        self._swallow_left = {str(token) for token in added.values() if token.lstrip}
        self._pattern = re.compile("|".join(map(re.escape, strings))) if strings else None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._data = _data_backend(backend, set(self.control.values())) if backend is not None else None
        self.eos_ids = tuple({i for i in [tokenizer.eos_token_id] if i is not None})

    @property
    def tokenizer(self) -> Any:
        """As transformers has it."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the model is a chat model."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def speaks_in_channels(self) -> bool:
        """Whether thinking and answer come in channels, as those of gpt-oss."""
        return self.has_chat_template and CHANNEL in self._tokenizer.get_chat_template()

    def render_chat(
        self, message: str, args: Mapping[str, Any], today: date, thinking: str = "auto", system: str = ""
    ) -> str:
        """The user message in the model's chat template, up to where the answer starts; as it is where there is none.

        today: what the template takes for the current date. thinking: off, on or auto (as the template has it); what
        `args` say goes before it. system: a message before the user's. Raises JobError if the template fails, or cannot
        do what `thinking` and `system` ask.
        """
        if not self.has_chat_template:
            if system:
                raise JobError("--system: the model has no chat template; write it into a --prompt-file")
            if args:
                raise JobError("--chat-template-args: the model has no chat template")
            if thinking == "on":
                raise JobError("--thinking on: the model has no chat template; leave --thinking out")
            return message
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": message})
        try:
            template = self._tokenizer.get_chat_template(args.get("chat_template"))
            known = may_think(template)
            args = {**template_switches(template, thinking), **args}
            if CLOCK in template:
                args = {**args, "chat_template": dated(template, today)}
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **args)
        except Exception as error:  # templates raise Jinja errors of many kinds
            raise JobError(f"the model's chat template failed: {one_line(error)}") from None
        if system.strip() not in text:
            raise JobError("--system: the model's chat template has no place for it; write it into a --prompt-file")
        if thinking == "on" and not known:
            raise JobError("--thinking on: the model's chat template knows of no thinking; leave --thinking out")
        return text

    def last_control(self, text: str) -> int:
        """Where the last control token in `text` ends, with the white space that it swallows; 0 if there is none."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            end = match.end()
            if match.group() in self._swallow_right:
                end += len(text[end:]) - len(text[end:].lstrip())
        return end

    def first_control(self, text: str) -> int:
        """Where the first control token in `text` starts, with the white space that it swallows; its length if none."""
        match = self._pattern.search(text) if self._pattern else None
        if match is None:
            return len(text)
        return len(text[: match.start()].rstrip()) if match.group() in self._swallow_left else match.start()

    def encode_template(self, text: str, *, starts: bool) -> np.ndarray:
        """int32 ids of trusted text, control tokens included.

        starts: it stands at the prompt's start; without a chat template the tokenizer's own opening tokens come first.
        """
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if starts and not self.has_chat_template:
            ids = self._opening() + ids
        return np.asarray(ids, dtype=np.int32)

    def _opening(self) -> list[int]:
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        for i in range(len(whole) - len(plain) + 1):
            if whole[i : i + len(plain)] == plain:
                return whole[:i]
        return []

    def encode_data(self, text: str) -> np.ndarray:
        """int32 ids of untrusted text; no control token is among them. Raises DocumentError."""
        ids = self._encode(text)
        if not np.isin(ids, self._forbidden).any():
            return ids
        # The vocabulary itself holds a control string as a word: cut those strings open, so that none is left to find.
        pieces: list[str] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            pieces += [text[position : match.start() + 1]]
            position = match.start() + 1
        ids = np.concatenate([self._encode(piece) for piece in [*pieces, text[position:]] if piece])
        found = np.intersect1d(ids, self._forbidden)
        if len(found):
            raise DocumentError(
                f"its text encodes to the control token {self.control[int(found[0])]!r}; "
                "the tokenizer cannot tell them apart"
            )
        return ids

    def encode_behind(self, text: str) -> np.ndarray:
        """encode_data of text that stands behind other text: nothing is put before its first word."""
        if not text:
            return np.empty(0, np.int32)
        anchor, whole = self.encode_data("\n"), self.encode_data("\n" + text)
        # Where a token reaches across the line break, the text is taken by itself.
        return whole[len(anchor) :] if _common(anchor, whole) == len(anchor) else self.encode_data(text)

    def _encode(self, text: str) -> np.ndarray:
        if self._data is not None:
            ids = self._data.encode_batch_fast([text], add_special_tokens=False)[0].ids
        else:
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def span(self, left: str, right: str, ids: np.ndarray) -> tuple[int, int]:
        """[first, last) of `ids`, which encode left + text + right, without tokens that have a share in left or right.

        Where a word reaches across the border, the token on the border is left out of the span.
        """
        before, after = (self._encode(part) if part else np.empty(0, np.int32) for part in (left, right))
        first = _common(before, ids)
        last = len(ids) - _common(after[::-1], ids[::-1])
        first += len(before) > first
        last -= len(after) > len(ids) - last
        return first, max(first, last)

    def prefix_chars(self, text: str, tokens: int) -> int:
        """Characters of `text` that its first `tokens` tokens hold; all of them if it has no more tokens."""
        if self._data is None:
            ids = self._encode(text)
            return len(text) if len(ids) <= tokens else max(1, len(self.decode(ids[:tokens].tolist())))
        characters = tokens * 6
        encoding = self._data.encode(text[:characters], add_special_tokens=False)
        while len(encoding) <= tokens:
            if characters >= len(text):
                return len(text)
            characters *= 2
            encoding = self._data.encode(text[:characters], add_special_tokens=False)
        return next(
            (chars[1] for i in range(tokens - 1, -1, -1) if (chars := encoding.token_to_chars(i)) and chars[1]), 1
        )

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, control tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, ids: list[int], opened: bool) -> Answer:
        """The text of generated tokens, the model's thinking apart; without any, what decode() gives.

        opened: the prompt has opened the thinking.
        """
        control = [self.control.get(token, "") for token in ids]
        markers = markers_of(control)
        pieces, begin, marker = [], 0, ""
        for end, name in enumerate(control):
            if name in markers:
                pieces.append((marker, self.decode(ids[begin:end])))
                begin, marker = end + 1, name
        pieces.append((marker, self.decode(ids[begin:])))
        return split_answer(pieces, opened) or Answer(self.decode(ids))


def dated(template: str, today: date) -> str:
    """A chat template whose strftime_now() tells the midnight of `today`, whenever it is rendered.

    It begins with a macro of that name, which hides the function that transformers gives to templates.
    """
    moment = datetime.combine(today, time())
    told = "".join(
        f".replace({code!r}, {moment.strftime(code)!r})" for code in sorted(set(FORMAT_CODE.findall(template)))
    )
    # A block swallows the line break behind it, and nothing else.
    return f"{{%- macro {CLOCK}(format) %}}{{{{ format{told} }}}}{{%- endmacro %}}\n{template}"


def _common(part: np.ndarray, whole: np.ndarray) -> int:
    """How many leading elements are the same."""
    count = min(len(part), len(whole))
    differ = np.flatnonzero(part[:count] != whole[:count])
    return int(differ[0]) if len(differ) else count


def _bracketed(token: str) -> bool:
    text = token.strip()
    return len(text) > 2 and (text[0] + text[-1]) in ("<>", "[]", "｟｠")


def _data_backend(backend: Any, control: set[str]) -> Any:
    """A `tokenizers` tokenizer like `backend`, with its model, that reads every string in `control` as plain text."""
    from tokenizers.models import BPE

    # All but the model, which the two share: a large vocabulary takes half a second to parse.
    frame = type(backend)(BPE())
    frame.normalizer, frame.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    spec = json.loads(frame.to_str())
    if control:
        _never_prefix(spec["pre_tokenizer"])
    copied = type(backend).from_str(json.dumps(spec))
    copied.model = backend.model
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for token in added:
        token.special = token.content in control
    copied.add_tokens(added)
    copied.encode_special_tokens = True
    return copied


def _never_prefix(node: Any) -> None:
    # "first" puts a space before the very first word only; the document stands behind the template's opening tokens.
    if isinstance(node, dict):
        if node.get("prepend_scheme") == "first":
            node["prepend_scheme"] = "never"
        for value in node.values():
            _never_prefix(value)
    elif isinstance(node, list):
        for value in node:
            _never_prefix(value)
