"""The engine gives the tokens of transformers' generate, whatever the batch and the chunk size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from engine_models import ARCHITECTURES, TINY_READER, generate, prompts, run, save_model

from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.model.self_check import TESTED_TYPES

NEW = 12
LENGTHS = [300, 1, 127, 129, 64]
# transformers changes LongRoPE's frequencies when an output grows past the original context, and leaves the keys that
# it cached before as they were; the engine decides once for a document. So no document here crosses 128 while decoding.
LONGROPE_LENGTHS = [300, 1, 116, 129, 64]

Expected = tuple[Path, list[np.ndarray], list[list[int]]]


@pytest.fixture(scope="module", params=sorted(set(ARCHITECTURES) - {"gemma2"}))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    folder = save_model(tmp_path_factory.mktemp("model"), request.param)
    texts = prompts(LONGROPE_LENGTHS if request.param == "phi3_longrope" else LENGTHS)
    return folder, texts, [generate(folder, prompt, NEW) for prompt in texts]


def test_these_are_the_tested_types() -> None:
    """Every other type is checked when it is loaded: whoever adds one to the list adds it here."""
    configs = [getattr(transformers, name) for family, (name, _) in ARCHITECTURES.items() if family != "gemma2"]
    assert {config.model_type for config in configs} == TESTED_TYPES


@pytest.mark.parametrize("documents", [1, 2, 3, 4, 5])
def test_ragged_batch_equals_generate(model: Expected, documents: int) -> None:
    folder, texts, expected = model
    engine = Engine(EngineConfig(str(folder), device="cpu", chunk_tokens=128, arena_tokens=4096))
    requests = [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts[:documents])]
    done = run(engine, requests)
    assert [done[str(i)].token_ids for i in range(documents)] == expected[:documents]
    assert {completion.status for completion in done.values()} == {"ok"}


@pytest.mark.parametrize("chunk_tokens", [64, 100, 4096])
@pytest.mark.parametrize("decode_lag", [0, 3])
def test_chunks_and_lag_change_nothing(model: Expected, chunk_tokens: int, decode_lag: int) -> None:
    folder, texts, expected = model
    config = EngineConfig(
        str(folder), device="cpu", chunk_tokens=chunk_tokens, arena_tokens=4096, decode_lag=decode_lag
    )
    done = run(Engine(config), [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert [done[str(i)].token_ids for i in range(len(texts))] == expected


def test_fused_model_gives_the_same_tokens(model: Expected) -> None:
    folder, texts, expected = model
    engine = Engine(EngineConfig(str(folder), device="cpu", fuse=True, chunk_tokens=128, arena_tokens=4096))
    fusion = engine.describe()["fusion"]
    assert sum(fusion["fused"].values()) > 0, fusion
    done = run(engine, [Request(str(i), prompt, NEW) for i, prompt in enumerate(texts)])
    assert [done[str(i)].token_ids for i in range(len(texts))] == expected


def test_trained_model_on_a_report() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_READER)
    text = "The valve at Port Hale was replaced on day 412. " * 60
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    prompt = np.asarray(ids["input_ids"] if hasattr(ids, "keys") else ids)
    expected = generate(TINY_READER, prompt, 24)
    engine = Engine(EngineConfig(str(TINY_READER), device="cpu", chunk_tokens=256, arena_tokens=8192))
    done = run(engine, [Request("report", prompt, 24), Request("half", prompt[: len(prompt) // 2], 24)])
    assert done["report"].token_ids == expected
    assert done["half"].token_ids == generate(TINY_READER, prompt[: len(prompt) // 2], 24)
