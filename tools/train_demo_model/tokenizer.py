"""The small tokenizer: byte-level BPE over the training language."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from jobs.known.grammar import NAMES
from tools.train_demo_model.facts import Counts, make_facts
from tools.train_demo_model.language import BEASTS, COLOURS, filler

VOCABULARY = 2048
SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ ('<|assistant|>' if m['role'] == 'assistant' else '<|user|>') + "
    "m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def train_tokenizer(folder: Path, seed: int = 0, documents: int = 3000) -> None:
    """Write tokenizer.json, its config and the chat template to `folder`.

    Digits, white space before digits and newlines are single tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = Random(seed)
    texts = [filler("report", rng, 50) for _ in range(documents // 8)]
    texts += [filler("salad", rng, 20) for _ in range(documents // 30)]
    texts += [filler("invented", rng, 20) for _ in range(documents // 50)]
    texts += [" ".join([*COLOURS, *BEASTS, *NAMES]), "".join(COLOURS) + " ".join(BEASTS)] * 20
    for _ in range(documents):
        facts = make_facts(rng, Counts())
        texts += [" " + needle.text for needle in facts.needles] + [facts.summary(rng).answer]
        texts += [part for needle in facts.needles for ask in needle.asks for part in (ask.text, ask.answer)]

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\n|[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=40_960,
    ).save_pretrained(folder)


def vocabulary_size(folder: Path) -> int:
    """Tokens of the tokenizer in `folder`."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
    return max(ids) + 1
