"""Text models that are published inside models that also see: the text part runs, without the encoders' memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import TINY_READER, run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from pipeline.engine import Engine, EngineConfig, EngineError, Request, estimate_plan
from pipeline.engine.devices import weight_bytes
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.text_part import model_class
from pipeline.prompts.tokens import Tokens
from tools.models.check import build


@pytest.fixture(scope="module", params=["mistral3", "gemma3", "qwen3_vl", "glm4v"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny model with an encoder, in a folder, and as transformers made it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, build(request.param, folder)


def test_encoders_are_neither_loaded_nor_counted(saved: tuple[Path, Any]) -> None:
    folder, whole = saved
    config = EngineConfig(str(folder), device="cpu")
    part = load_model(config)
    theirs, ours = dict(whole.named_parameters()), dict(part.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    language: Any = whole.get_decoder()
    assert {id(theirs[name]) for name in ours} >= {id(parameter) for parameter in language.parameters()}
    assert not [name for name in ours if "vision_tower" in name or "visual" in name]
    assert len(ours) < len(theirs)
    assert estimate_plan(config).weight_bytes == weight_bytes(part) < weight_bytes(whole)


def test_random_weights_have_no_encoders_either(saved: tuple[Path, Any]) -> None:
    dummy = load_model(EngineConfig(str(saved[0]), device="cpu", load_format="dummy"))
    assert not [name for name, _ in dummy.named_parameters() if "vision_tower" in name or "visual" in name]


def test_what_a_checkpoint_has_too_little_or_too_much_is_still_named(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = saved
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.o_proj.weight") and "vis" not in name)
    tensor = weights.pop(name)
    weights[name.replace("layers.1.", "layers.7.")] = tensor
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"missing .*layers\.1\.self_attn.*without a place .*layers\.7\.self_attn"):
        load_model(EngineConfig(str(tmp_path), device="cpu"))


def test_a_prompt_with_a_token_that_stands_for_an_image_is_refused(saved: tuple[Path, Any]) -> None:
    folder, whole = saved
    names = ("image_token_id", "image_token_index")
    image = next(token for token in (getattr(whole.config, name, None) for name in names) if token is not None)
    engine = Engine(EngineConfig(str(folder), device="cpu", arena_tokens=512))
    done = run(engine, [Request("a", np.array([5, image, 6]), 2), Request("b", np.array([5, 7, 6]), 2)])
    assert (done["a"].status, done["b"].status) == ("error", "ok")
    assert done["a"].error == f"the prompt holds token {image}, which stands for an image or a sound: only text is read"


def test_an_image_token_in_a_document_is_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_READER)
    marks = ["<|image_pad|>", "[IMG]", "<image_soft_token>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    images = tokenizer.convert_tokens_to_ids(marks)
    tokens = Tokens(tokenizer)
    text = f"before {' '.join(marks)} behind"
    assert set(images) <= set(tokenizer(text)["input_ids"])
    assert not np.isin(tokens.encode_data(text), images).any()
    assert tokens.decode(tokens.encode_data(text).tolist()).split() == text.split()


def test_a_class_for_the_text_part_alone_is_taken_where_there_is_one() -> None:
    with torch.device("meta"):
        model = model_class(Qwen3_5Config()).from_config(Qwen3_5Config())
    assert type(model) is Qwen3_5ForCausalLM
