"""Documents to lose, a model to lose them with, and the count afterwards."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.imports import ROOT

READER = ROOT / "models" / "tiny-reader"
WORDS = [
    "harbour",
    "committee",
    "winter",
    "budget",
    "survey",
    "storm",
    "repair",
    "circuit",
    "student",
    "forecast",
    "ledger",
    "quiet",
]


def write_documents(folder: Path, count: int, words: int = 12) -> list[str]:
    """`count` documents of `words` to 2 * `words` words, half in Parquet, half in JSON lines; their ids."""
    folder.mkdir(parents=True)
    rows = [{"id": f"doc-{i:06}", "text": _text(i, words + i % words)} for i in range(count)]
    half = count // 2
    pq.write_table(pa.Table.from_pylist(rows[:half]), folder / "a.parquet", row_group_size=1000)
    with (folder / "b.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[half:])
    return [row["id"] for row in rows]


def _text(number: int, words: int) -> str:
    chosen = [WORDS[(number * 7 + i * (number % 11 + 1)) % len(WORDS)] for i in range(words)]
    return f"Report {number}. " + " ".join(chosen) + "."


def write_model(folder: Path, layers: int = 2, width: int = 64) -> Path:
    """A random model of two narrow layers with the bundled model's tokenizer; real, and as fast as one can be."""
    import torch
    import transformers

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4}
    ids: dict[str, Any] = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    # Wide weights keep the tokens of a random model apart: near-ties would turn on rounding.
    config = transformers.Qwen3Config(
        **size, **heads, **ids, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.3
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(READER / name, folder / name)
    return folder


@dataclass(frozen=True)
class Count:
    """What became of the documents. computed: times that one was given to an engine, over all runs."""

    documents: int
    lost: int
    doubled: int
    statuses: dict[str, int]
    computed: int

    @property
    def exact(self) -> bool:
        """Every document has one row."""
        return not self.lost and not self.doubled

    @property
    def again(self) -> int:
        """Documents that were computed more than once, counting each time."""
        return max(0, self.computed - self.documents)


def count_rows(output: Path, ids: list[str], log: Path | None = None) -> Count:
    """Count the rows in the part files as any Parquet reader sees them."""
    found: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    for part in sorted(output.glob("part-*.parquet")):
        table = pq.read_table(part, columns=["document_id", "status"])
        found.update(table["document_id"].to_pylist())
        statuses.update(table["status"].to_pylist())
    lost = sum(1 for document_id in ids if document_id not in found)
    doubled = sum(count - 1 for count in found.values())
    computed = log.read_bytes().count(b"\n") if log is not None and log.exists() else 0
    return Count(len(ids), lost, doubled, dict(statuses), computed)
