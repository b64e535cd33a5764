"""How facts and questions are worded: as in RULER, or in the language that models/tiny-reader was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

# A model with so few tokens can only be one of the project's own, trained on the language of its reports.
SMALL_VOCABULARY = 4096


@dataclass(frozen=True)
class Style:
    """Texts with {fields}. A prefix is put at the start of the answer, as RULER does; it may be empty.

    hops: steps of a chain of variables. values: values of a key with several. sentences: whether a finding is scored
    as a whole sentence, copied word for word, or by its figure.
    """

    name: str
    hops: int
    values: int
    sentences: bool
    chain_start: str
    chain_step: str
    ask_chain: str
    ask_findings: str
    preambles: dict[str, str] = field(default_factory=dict)

    # Worded as in RULER in both styles.
    needle: str = "One of the special magic numbers for {key} is: {value}."
    ask_number: str = "What is the special magic number for {key} mentioned in the provided text?"
    ask_numbers: str = "What are all the special magic numbers for {key} mentioned in the provided text?"
    ask_fact: str = "What was the {measure}?"
    ask_common: str = "What are the 10 most common words in the above list?"
    ask_frequent: str = "What are the three most frequently appeared words in the above coded text?"

    def preamble(self, kind: str) -> str:
        """What stands before a document of this kind."""
        return self.preambles.get(kind, "")

    def prefix(self, asked: str, **fields: str) -> str:
        """How the answer to one of the questions above begins; empty where the model is left to begin itself."""
        return PREFIXES[asked].format(**fields) if self.name == "ruler" else ""


_HIDDEN = (
    "Some special magic numbers and variables are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about them afterwards.\n"
)
PREFIXES = {
    "ask_number": "The special magic number for {key} mentioned in the provided text is",
    "ask_numbers": "The special magic numbers for {key} mentioned in the provided text are",
    "ask_fact": "The {measure} was",
    "ask_chain": "{count} variables are assigned the value {value}, they are:",
    "ask_common": "The top 10 words that appear most often in the list are:",
    "ask_frequent": "The three most frequently appeared words are:",
    "ask_findings": "",
}

RULER = Style(
    name="ruler",
    hops=4,
    values=4,
    sentences=False,
    chain_start="VAR {name} = {value}.",
    chain_step="VAR {name} = VAR {previous}.",
    ask_chain="Find all variables that are assigned the value {value} in the text above.",
    ask_findings="List the key findings of this report in order, each copied word for word.",
    preambles={
        **dict.fromkeys(("noise", "essay", "records", "distractors"), _HIDDEN),
        "words": "Below is a numbered list of words. Memorize the ones that appear most often.\n",
        "coded": "Read the following coded text and track the frequency of each coded word.\n",
    },
)
REPORT = Style(
    name="report",
    hops=2,
    values=3,
    sentences=True,
    chain_start="Lot {name} was valued at {value} dollars.",
    chain_step="Lot {name} has the same value as lot {previous}.",
    ask_chain="What is the value of lot {name}?",
    ask_findings="List the key findings in order.",
)
STYLES = {"ruler": RULER, "report": REPORT}


def pick_style(name: str, vocabulary: int) -> Style:
    """The style of that name; "auto" takes `report` for the project's own models, told by their tiny vocabulary."""
    if name == "auto":
        return REPORT if vocabulary <= SMALL_VOCABULARY else RULER
    return STYLES[name]
