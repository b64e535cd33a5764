"""Stores a model in fp8, more exactly than each weight rounded to the nearest: by llm-compressor's GPTQ.

    pip install llmcompressor    # in an environment of its own
    python store_fp8.py MODEL TEXT.txt [TEXT.txt ...] OUT

TEXT.txt: what the model will read, or something like it; pieces of 1,024 tokens from places spread over the texts are
what rounded weights are fitted to. Keys, values and the last layer stay in 16 bits, as `--precision fp8` leaves them.
Then: python -m jobs.summarize --model OUT. What it gains: docs/quality.md.
"""

import sys
from pathlib import Path

from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import GPTQModifier  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECES, TOKENS = 12, 1024


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit(f"usage: {sys.argv[0]} MODEL TEXT.txt [TEXT.txt ...] OUT")
    name, *texts, out = sys.argv[1:]
    if Path(out).exists():
        sys.exit(f"error: {out} exists already; name a folder that is not there yet")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)
    ids = [token for text in texts for token in tokenizer(Path(text).read_text(encoding="utf-8")).input_ids]
    if len(ids) < TOKENS * PIECES:
        sys.exit(f"error: the texts have {len(ids):,} tokens together; {TOKENS * PIECES:,} or more are needed")
    step = (len(ids) - TOKENS) // (PIECES - 1)
    pieces = [ids[i * step : i * step + TOKENS] for i in range(PIECES)]
    last = model.config.get_text_config().num_hidden_layers - 1
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": pieces, "attention_mask": [[1] * TOKENS] * PIECES}),
        recipe=GPTQModifier(
            targets="Linear",
            scheme="FP8_DYNAMIC",
            dampening_frac=0.5,
            ignore=["lm_head", "re:.*k_proj", "re:.*v_proj", rf"re:.*layers\.{last}\..*"],
        ),
        max_seq_length=TOKENS,
        num_calibration_samples=PIECES,
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
