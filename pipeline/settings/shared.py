"""Settings that a job and its engine share, each declared once: how a model is loaded and held, how it generates.

Read without torch: the command line asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from stem_core.settings import check_all, setting

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")


@dataclass(frozen=True)
class EngineSettings:
    """A model, and how an engine holds it."""

    model: str = setting(
        "", "folder of a transformers model, its hub id, or a .gguf file", group="model", changes_output=True
    )
    revision: str | None = setting(None, "revision of a hub model", group="model", changes_output=True)
    trust_remote_code: bool = setting(False, "run code that comes with the model", group="model", changes_output=True)
    adapter: str | None = setting(
        None,
        "folder of a LoRA adapter, merged into the model when it loads",
        more="needs the package peft",
        group="model",
        changes_output=True,
        added_later=True,
    )
    rope_scaling: float | None = setting(
        None,
        "stretch the model's context by this factor (YaRN); unset: as its config has it",
        more="for documents beyond the context that a model was made for; it changes what the model reads of short "
        "ones, too, a little. Models whose config scales already are refused",
        above=1,
        high=64,
        group="model",
        changes_output=True,
        added_later=True,
    )
    precision: str = setting(
        "auto",
        "number format of weights, attention and KV; fp8 needs GPUs that have it; auto: bf16 on GPUs, fp32 on CPUs",
        more="fp8 (e4m3) is that of linear layers, attention and KV, the rest is in bf16, on a CPU in fp32; auto takes "
        "fp8 for a checkpoint that is stored in it",
        choices=PRECISIONS,
        group="engine",
        changes_output=True,
    )
    # 132 blocks of 128: an H100 has 132 multiprocessors, so that tiles fill whole rounds of them (measured,
    # Llama-3.1-8B in fp8, 128K tokens: 3% sooner than steps of 8192).
    chunk_tokens: int = setting(
        16896, "prompt tokens in one prefill step", more="rounded up to whole blocks", low=16, group="engine"
    )
    max_live: int = setting(8, "documents that a worker decodes together", low=1, high=1024, group="engine")
    max_context: int | None = setting(
        None,
        "most tokens of prompt and output; unset: the model's own limit",
        low=2,
        group="engine",
        changes_output=True,
    )
    arena_tokens: int | None = setting(None, "tokens of KV memory; unset: what is free", low=2, group="engine")
    prompt_lookup: str = setting(
        "auto",
        "auto: where outputs quote their documents, several tokens in one decode step; off: one token a step",
        more="drafts are what followed the newest tokens where they stood before, one is taken only where the model "
        "chose the same token: outputs are those of single steps, on a GPU up to rounding. While drafts do not pay, "
        "steps go without",
        choices=("auto", "off"),
        group="engine",
    )
    load_format: str = setting(
        "auto",
        "auto: the model's weights; dummy: random ones, for measuring",
        choices=("auto", "dummy"),
        group="engine",
        changes_output=True,
    )


@dataclass(frozen=True)
class ReadSettings:
    """How files become texts."""

    encoding: str = setting(
        "utf-8",
        "encoding of text files, CSV, and HTML that declares none, as Python names it: cp1252, say",
        more="what is not in it gets an error row that says which encoding it looks like; none is guessed. JSON lines "
        "and Parquet are UTF-8",
        kind="encoding",
        group="data",
        changes_output=True,
        added_later=True,
    )
    conversion_seconds: float = setting(
        120.0,
        "seconds to take the text out of one PDF, DOCX, EPUB or HTML file",
        above=0,
        high=86400,
        group="data",
    )
    conversion_memory: float = setting(
        2.0,
        "GiB of memory to take the text out of one PDF, DOCX, EPUB or HTML file",
        more="address space of the process that does it",
        low=0.25,
        high=1024,
        group="data",
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises SettingError."""

    temperature: float = setting(
        0.0,
        "randomness; 0 is greedy",
        more="of a model's generation_config.json only the end-of-sequence tokens hold, not how it samples",
        low=0,
        group="generation",
        changes_output=True,
    )
    top_p: float = setting(
        1.0,
        "share of the probability that sampling draws from",
        more="the smallest set of most likely tokens that reaches it",
        above=0,
        high=1,
        group="generation",
        changes_output=True,
    )
    top_k: int | None = setting(
        None,
        "most likely tokens that sampling draws from; unset: all",
        more="top_p then takes its share of their probability",
        low=1,
        group="generation",
        changes_output=True,
        added_later=True,
    )
    min_p: float = setting(
        0.0,
        "least probability of a token that sampling draws, as a share of the most likely one's",
        low=0,
        high=1,
        group="generation",
        changes_output=True,
        added_later=True,
    )
    repetition_penalty: float = setting(
        1.0,
        "divides the scores of tokens that stand in the prompt or the output already; 1 is off",
        more="as in transformers: a score below 0 is multiplied, and the whole document counts, so that a model is "
        "kept from quoting, too",
        above=0,
        group="generation",
        changes_output=True,
        added_later=True,
    )
    seed: int = setting(
        0,
        "seed of sampling; what is drawn for a document depends only on this and on the document's id",
        group="generation",
        changes_output=True,
    )

    def __post_init__(self) -> None:
        check_all(self)

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken as the model has it."""
        return self.temperature == 0 and self.repetition_penalty == 1
