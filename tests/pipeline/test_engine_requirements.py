"""Models that the engine would run wrongly are refused when they are loaded, with the name of the feature."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from engine_models import ARCHITECTURES, COMMON, save_model
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from pipeline.engine import Engine, EngineConfig, EngineError
from pipeline.engine.kv.arena import LayerShape
from pipeline.engine.model import last_layer, self_check
from pipeline.engine.model.loading import load_model, load_runner
from pipeline.engine.model.requirements import check_head_sizes, check_layers, check_windows
from pipeline.engine.model.runner import ModelRunner
from stem_core import StemConfig
from stem_core.patch import UnsupportedModelError

CPU = torch.device("cpu")
STEM = StemConfig(block_size=16, schedule="density", density=0.5, dense_below=0)
SLIDING, FULL = "sliding_attention", "full_attention"
# Config class, what it has beside COMMON, and what the error must say.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 64, "attention_window_size": 32},
        r"keeps a state in its modules \(model\.layers\.0\.temporal_block\.conv1d_state, .*change one another's",
    ),
    "nemotron": ("NemotronConfig", {}, r"does not hand the engine's context .* of its layers 0, 1, 2"),
    "gemma2": ("Gemma2Config", {}, "soft-capping"),
    "minimax": ("MiniMaxConfig", {"layer_types": ["linear_attention", FULL, FULL]}, "MiniMax uses cache of its own"),
    "jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8, "num_experts": 2},
        "in chunks than for the whole: its recurrent layers, as transformers computes them, do not go on",
    ),
}


def save(folder: Path, name: str, changes: dict[str, Any]) -> str:
    torch.manual_seed(1)
    config = getattr(transformers, name)(**(COMMON | changes))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
@pytest.mark.parametrize("family", REFUSED)
def test_what_the_engine_cannot_keep_is_named(tmp_path: Path, family: str, attention: StemConfig | None) -> None:
    name, changes, message = REFUSED[family]
    folder = save(tmp_path, name, changes)
    with pytest.raises(EngineError, match=message):
        Engine(EngineConfig(folder, device="cpu", attention=attention, arena_tokens=512))


@pytest.mark.parametrize(
    ("queries", "cached", "message"),
    [
        ({0: 2, 1: 2}, {0: 1, 1: 1}, ""),
        ({0: 2}, {0: 1, 1: 1}, "does not hand .* layers 1:"),
        ({}, {}, "does not hand"),
        ({0: 2, 1: 2}, {0: 1}, r"nor take those of another layer unchanged: 1\."),
        ({0: 2, 1: 1}, {0: 1, 1: 1}, r"leave out queries whose output nobody reads: 1\."),
        ({0: 2, 1: 2}, {0: 1, 1: 2}, r"several attentions in one layer: 1\."),
    ],
)
def test_layers_that_attend_are_those_that_cache(queries: dict[int, int], cached: dict[int, int], message: str) -> None:
    if not message:
        check_layers(nn.Linear(1, 1), queries, Counter(cached), tokens=2)
        return
    with pytest.raises(UnsupportedModelError, match=message):
        check_layers(nn.Linear(1, 1), queries, Counter(cached), tokens=2)


def test_keys_of_another_layer_are_known_by_what_they_are() -> None:
    model, keys, cached = nn.Linear(1, 1), {0: torch.zeros(1), 1: torch.zeros(1)}, Counter({0: 1, 1: 1})
    given = {0: keys[0], 1: keys[1], 2: keys[0], 3: keys[1]}
    assert check_layers(model, {0: 2, 1: 2, 2: 2, 3: 1}, cached, 2, given, keys) == {2: 0, 3: 1}
    with pytest.raises(UnsupportedModelError, match=r"another layer unchanged: 2\."):
        check_layers(model, {0: 2, 1: 2, 2: 2}, cached, 2, given | {2: keys[0].clone()}, keys)
    with pytest.raises(UnsupportedModelError, match=r"nobody reads: 2\."):
        check_layers(model, {0: 3, 1: 3, 2: 2}, cached, 3, given, keys)


@pytest.mark.parametrize(
    ("config", "windows", "silent"),
    [
        ({}, {0: None, 1: None}, ""),
        ({"sliding_window": 8}, {0: 8, 1: None}, ""),
        ({"sliding_window": 8}, {0: None, 1: None}, "0, 1"),
        ({"sliding_window": 8, "use_sliding_window": False}, {0: None, 1: None}, ""),
        ({"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}, {0: 8, 1: None, 2: 8}, ""),
        ({"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}, {0: 8, 1: None, 2: None}, "2"),
    ],
)
def test_windows_that_the_attention_is_not_told_of_are_named(
    config: dict[str, Any], windows: dict[int, int | None], silent: str
) -> None:
    class Text(SimpleNamespace):
        def get_text_config(self) -> Text:
            return self

    model: Any = nn.Linear(1, 1)
    model.config = Text(**config)
    if not silent:
        check_windows(model, windows)
        return
    with pytest.raises(UnsupportedModelError, match=f"does not tell the attention of its layers {silent};"):
        check_windows(model, windows)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(513, 513), (576, 512), (192, 640)])
def test_heads_that_no_gpu_kernel_holds_are_refused(head_dim: int, value_dim: int) -> None:
    shapes = {0: LayerShape(2, 512, 512), 1: LayerShape(2, head_dim, value_dim)}
    gpu = torch.device("cuda", 0)
    with pytest.raises(UnsupportedModelError, match=rf"layer 1 has heads of {max(head_dim, value_dim)} \(head_dim\)"):
        check_head_sizes(shapes, {0: gpu, 1: gpu})
    check_head_sizes(shapes, {0: gpu, 1: CPU})
    check_head_sizes({0: shapes[0]}, {0: gpu})


def test_a_model_that_fails_on_its_first_prompt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(self: Qwen3MLP, x: Tensor) -> Tensor:
        raise KeyError("full_attention")

    folder = save_model(tmp_path, "qwen3")
    monkeypatch.setattr(Qwen3MLP, "forward", lookup)
    with pytest.raises(EngineError, match=r"Qwen3ForCausalLM cannot read a prompt here \(KeyError: 'full_attention'"):
        load_runner(EngineConfig(str(folder), device="cpu"))


def test_a_model_that_fails_the_self_check_with_an_error_says_so(tmp_path: Path) -> None:
    """Positions are learned, and there are fewer than the check reads."""
    folder = save(tmp_path, "GPT2Config", {"max_position_embeddings": 64})
    with pytest.raises(EngineError, match=r"GPT2LMHeadModel cannot read a prompt here \(IndexError: index out of"):
        load_runner(EngineConfig(folder, device="cpu"))


def test_heads_are_the_reason_where_a_kernel_does_not_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel fails first, in its own words."""

    def does_not_fit(self: Qwen3MLP, x: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    def too_large(shapes: dict[int, LayerShape], devices: dict[int, torch.device]) -> None:
        assert shapes == {0: LayerShape(2, 16, 16)}, "of the layers that ran"
        raise UnsupportedModelError("layer 0 has large heads")

    folder = save_model(tmp_path, "qwen3")
    monkeypatch.setattr(Qwen3MLP, "forward", does_not_fit)
    monkeypatch.setattr("pipeline.engine.model.runner.check_head_sizes", too_large)
    with pytest.raises(EngineError, match="layer 0 has large heads"):
        load_runner(EngineConfig(str(folder), device="cpu"))


# -- the self-check: models that no structure gives away


class Neighbours(Qwen3MLP):
    """Documents of a batch see one another."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(0, keepdim=True) * (x.shape[0] > 1))


class Last(Qwen3MLP):
    """The state of the last document that was read is that of all, and hidden from a look at tensors."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            self.state = [x[0, -1].clone()]
        return super().forward(x + getattr(self, "state", [0])[0] * (x.shape[1] == 1))


class Convolution(Qwen3MLP):
    """Mixes a token with the one before it, of which it knows nothing where a chunk begins."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class Chunk(Qwen3MLP):
    """Counts positions from the chunk's beginning."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.flip(-1) * torch.arange(x.shape[1]).sin().to(x)[:, None])


FAULTS = {
    Neighbours: "other logits for documents together than for each alone",
    Last: "other logits for documents together than for each alone",
    Convolution: "other logits for a prompt that is read in chunks than for the whole",
    Chunk: "other logits for a prompt that is read in chunks than for the whole",
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("fault", FAULTS)
def test_documents_that_change_each_other_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type, precision: str
) -> None:
    folder = save_model(tmp_path, "qwen3", initializer_range=0.1)
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", fault)
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    with pytest.raises(EngineError, match=rf"Qwen3ForCausalLM \(model type qwen3\) gives {FAULTS[fault]}"):
        load_runner(EngineConfig(str(folder), device="cpu", precision=precision, fuse=False))


def test_a_last_layer_that_is_cut_wrongly_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of the whole chunk's first rows for its last ones."""
    cut = last_layer._rows
    monkeypatch.setattr(last_layer, "_rows", lambda value, dim, rows: cut(value, dim, slice(0, rows.stop - rows.start)))
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    config = EngineConfig(str(save_model(tmp_path, "qwen3", initializer_range=0.1)), device="cpu", fuse=False)
    with pytest.raises(EngineError, match="where its last layer is run to its end for a prompt's last block alone"):
        load_runner(config)


class Chaotic(Qwen3MLP):
    """A rounding decides what it gives, as where experts are about equally good."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + (30 * x.double().sum(-1, keepdim=True)).sin()).to(x)


def test_what_a_rounding_turns_over_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, "qwen3", initializer_range=0.1)
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", Chaotic)
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    load_runner(EngineConfig(str(folder), device="cpu", fuse=False))
    monkeypatch.setattr(self_check, "CHAOS", 0.0)
    with pytest.raises(EngineError, match="other logits"):
        load_runner(EngineConfig(str(folder), device="cpu", fuse=False))


def test_random_weights_of_which_nothing_can_be_told_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding changes all that they say; a checkpoint of which that is true is refused."""
    folder = save_model(tmp_path, "qwen3", initializer_range=0.1)
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", Chaotic)
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    monkeypatch.setattr(self_check, "difference", lambda got, expected: 1.0)
    config = EngineConfig(str(folder), device="cpu", fuse=False, load_format="dummy")
    with pytest.warns(RuntimeWarning, match="arithmetic was not checked: with these random weights roundings alone"):
        load_runner(config)
    with pytest.raises(EngineError, match="other logits"):
        load_runner(replace(config, load_format="auto"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_counts_positions_in_its_own_way_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Left to itself, it counts from 2, as models do whose table of positions has places for padding."""
    forward = modeling_qwen3.Qwen3Model.forward

    def own(self: Any, input_ids: Tensor, position_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        counted = torch.arange(input_ids.shape[1])[None] + 2 if position_ids is None else position_ids
        embeddings = self.embed_tokens(input_ids)
        embeddings = embeddings + embeddings.flip(-1) * counted.sin().to(embeddings)[..., None]
        return forward(self, inputs_embeds=embeddings, position_ids=position_ids, **others)

    folder = save_model(tmp_path, "qwen3", initializer_range=0.1)
    monkeypatch.setattr(modeling_qwen3.Qwen3Model, "forward", own)
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    with pytest.raises(EngineError, match="other logits with a cache and positions counted from 0 than by itself"):
        load_runner(EngineConfig(str(folder), device="cpu", precision=precision, fuse=False))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gemma2"}))
def test_sound_models_pass(tmp_path: Path, architecture: str, precision: str) -> None:
    """The tested types; their weights are wide, so that rounding is large."""
    changes = {} if architecture == "phi3_longrope" else {"head_dim": 32}
    folder = save_model(tmp_path, architecture, **changes)
    model = load_model(EngineConfig(str(folder), device="cpu", precision=precision))
    self_check.self_check(ModelRunner(model, STEM.replace(block_size=32)))


def test_a_model_on_several_devices_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, "qwen3")
    monkeypatch.setattr(self_check, "TESTED_TYPES", frozenset())
    load_runner(EngineConfig(str(folder), device="cpu"), [CPU, CPU, CPU])
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", Chunk)
    with pytest.raises(EngineError, match="read in chunks"):
        load_runner(EngineConfig(str(folder), device="cpu"), [CPU, CPU, CPU])


@pytest.mark.parametrize(
    ("name", "checked"),
    [("LlamaConfig", False), ("Qwen3MoeConfig", False), ("SmolLM3Config", True), ("GlmConfig", True)],
)
def test_types_that_are_not_tested_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, checked: bool
) -> None:
    seen = []
    monkeypatch.setattr("pipeline.engine.model.loading.self_check", lambda runner, **_: seen.append(runner))
    changes = {"num_experts": 2, "num_experts_per_tok": 1} if "Moe" in name else {}
    load_runner(EngineConfig(save(tmp_path, name, changes), device="cpu"))
    assert bool(seen) == checked


def test_code_that_comes_with_a_checkpoint_is_checked(tmp_path: Path) -> None:
    runner = load_runner(EngineConfig(str(save_model(tmp_path, "llama")), device="cpu"))
    assert self_check.is_tested(runner)
    own = type("LlamaForCausalLM", (type(runner.model),), {"__module__": "transformers_modules.own.modeling_llama"})
    runner.model.__class__ = own
    assert not self_check.is_tested(runner), "the type's name is no promise"
