"""The prompts from which the engine takes its fp8 scales: always the same ones, made of token ids alone.

Random ids, not text: the engine has no tokenizer, and what a scale needs is the size of a head's values, not their
meaning. Weights and norms set that size; the largest keys stand on the first token, which is why two of the prompts
begin with the beginning-of-sequence token, as production prompts do, and one with any token. Scales are powers of two
with room for values 16 times as large as those seen (stem_core.kv_scales), and e4m3 loses nothing by room. On the
bundled model they come to those from its own reports within a factor of 2 (tests/pipeline/test_engine_fp8.py).
"""

from __future__ import annotations

import numpy as np

PROMPT_TOKENS = 512
PROMPTS = 3
SEED = 20261123


def calibration_prompts(vocabulary: int, bos: int | None, limit: int | None = None) -> list[list[int]]:
    """PROMPTS rows of token ids below `vocabulary`, of PROMPT_TOKENS tokens or `limit` if that is less."""
    length = min(PROMPT_TOKENS, limit or PROMPT_TOKENS)
    generator = np.random.default_rng(SEED)
    prompts = generator.integers(0, vocabulary, size=(PROMPTS, length))
    if isinstance(bos, int) and bos < vocabulary:
        prompts[:-1, 0] = bos
    return prompts.tolist()
