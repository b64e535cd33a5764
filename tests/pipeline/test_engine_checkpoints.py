"""Checkpoints in other forms than safetensors in 16 or 32 bits: what is read gives the tokens of the plain model.

What is not read is refused in one line that says what to do.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import generate, prompts, run, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import model_files, summarize
from pipeline.engine import Engine, EngineConfig, EngineError, ModelLoadError, Request, estimate_plan
from pipeline.engine.model.loading import context_limit, load_config, load_model
from pipeline.engine.model.precision import resolve_precision
from pipeline.engine.model.rope import stretch, stretch_hint
from pipeline.errors import JobError
from pipeline.job import manifest
from pipeline.job.configs import make_engine_config, model_label
from pipeline.job.dry_run import describe_plan
from pipeline.settings.config import JobConfig
from stem_core.fp8 import Fp8Experts, Fp8Linear

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
BLOCK = 32


def engine_tokens(model: Path | str, **settings: Any) -> list[int]:
    engine = Engine(EngineConfig(str(model), device="cpu", arena_tokens=512, **settings))
    return run(engine, [Request("a", prompts([60])[0], 8)])["a"].token_ids


def rewrite(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | config))
    return folder


# ---- pytorch_model.bin


def test_tensors_of_a_pickle_are_read(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama", tie_word_embeddings=False)
    expected = generate(folder, prompts([60])[0], 8)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    manifest.model_fingerprint(str(folder), None)
    assert engine_tokens(folder) == expected


class Call:
    """What a pickle can do when it is loaded: here, write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    folder, trace = save_model(tmp_path / "model", "llama"), tmp_path / "it ran"
    tensors = load_file(folder / "model.safetensors") | {"extra": Call(trace)}
    (folder / "model.safetensors").unlink()
    if zipped:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Call(trace)))
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin holds more than tensors.*save_pretrained"):
        load_model(EngineConfig(str(folder), device="cpu"))
    assert not trace.exists()


def test_folders_without_weights_that_are_read_say_what_to_do(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(JobError, match="weights are missing: download"):
        manifest.model_fingerprint(str(folder), None)
    (folder / "model.ckpt").touch()
    with pytest.raises(JobError, match="pickled weights can run code"):
        manifest.model_fingerprint(str(folder), None)
    (folder / "a-Q4_K_M.gguf").touch()
    with pytest.raises(JobError, match=r"give that itself, --model .*a-Q4_K_M\.gguf"):
        manifest.model_fingerprint(str(folder), None)


# ---- block-scaled fp8


def store_in_blocks(folder: Path, names: str = "_proj.weight") -> tuple[Path, dict[str, Tensor]]:
    """Linears (and experts) as DeepSeek and Qwen publish them; also what they are worth, in float32."""
    tensors, worth = dict(load_file(folder / "model.safetensors")), {}
    for name, weight in list(tensors.items()):
        if name.endswith(names):
            rows, columns = weight.shape
            blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = (blocks.abs().amax((1, 3)) / 448).float()
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            tensors |= {name: (weight / wide).to(FP8), f"{name}_scale_inv": scale}
            worth[name] = tensors[name].float() * wide
        else:
            tensors[name] = weight.bfloat16()
            worth[name] = tensors[name].float()
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    return rewrite(folder, tensors, quantization_config=quantization), worth


def plain_copy(folder: Path, architecture: str, worth: dict[str, Tensor]) -> Path:
    """The same model with the values in float32."""
    save_model(folder, architecture, tie_word_embeddings=False)
    return rewrite(folder, load_file(folder / "model.safetensors") | worth)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_block_scales_are_applied_exactly(tmp_path: Path, architecture: str) -> None:
    folder, worth = store_in_blocks(save_model(tmp_path / "fp8", architecture, tie_word_embeddings=False))
    plain = plain_copy(tmp_path / "plain", architecture, worth)
    config = EngineConfig(str(folder), device="cpu")
    loaded = dict(load_model(config).named_parameters())
    expected = dict(load_model(EngineConfig(str(plain), device="cpu")).named_parameters())
    assert loaded.keys() == expected.keys()
    for name, parameter in loaded.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name]), name
    assert engine_tokens(folder) == engine_tokens(plain)
    assert estimate_plan(config).weight_bytes == estimate_plan(EngineConfig(str(plain), device="cpu")).weight_bytes


@pytest.mark.parametrize(
    ("architecture", "layer", "kind"),
    [("qwen3", "model.layers.1.mlp.up_proj", Fp8Linear), ("qwen3_moe", "model.layers.1.mlp.experts", Fp8Experts)],
)
def test_block_scaled_weights_are_quantised_as_any_other(
    tmp_path: Path, architecture: str, layer: str, kind: type
) -> None:
    folder, worth = store_in_blocks(save_model(tmp_path / "fp8", architecture, tie_word_embeddings=False))
    plain = plain_copy(tmp_path / "plain", architecture, worth)
    got, expected = (load_model(EngineConfig(str(path), device="cpu", precision="fp8")) for path in (folder, plain))
    assert isinstance(got.get_submodule(layer), kind)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor.float(), got.state_dict()[name].float()), name
    about = Engine(EngineConfig(str(folder), device="cpu", arena_tokens=512)).describe()
    assert about["precision"] == "fp32, weights dequantised from fp8 with scales for blocks of 32 x 32"


def test_auto_takes_fp8_for_block_scales_where_gpus_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = store_in_blocks(save_model(tmp_path, "qwen3"))
    hf_config = load_config(EngineConfig(str(folder), device="cpu"))
    assert resolve_precision("auto", CPU, hf_config).name == "fp32"
    for obstacle, name in (("", "fp8"), ("it is too old", "bf16")):
        monkeypatch.setattr("pipeline.engine.model.precision.fp8_obstacle", lambda device, found=obstacle: found)
        assert resolve_precision("auto", torch.device("cuda", 0), hf_config).name == name


# ---- compressed-tensors and others

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
needs_package = pytest.mark.skipif(
    not importlib.util.find_spec("compressed_tensors"), reason="compressed-tensors is not installed"
)


def compressed(weights: dict[str, Any], form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": form}}, "ignore": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip


def store_experts_in_fp8(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors, worth = dict(load_file(folder / "model.safetensors")), {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            scale = (weight.abs().amax(1, keepdim=True) / 448).float()
            tensors |= {name: (weight / scale).to(FP8), f"{name}_scale": scale}
            worth[name] = tensors[name].float() * scale
    return rewrite(folder, tensors, quantization_config=compressed(FLOAT8, "float-quantized")), worth


def test_experts_in_compressed_tensors_are_refused_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = store_experts_in_fp8(save_model(tmp_path, "qwen3_moe"))
    monkeypatch.setattr("stem_core.fp8.checkpoint.importlib.util.find_spec", lambda name: None)
    for call in (load_model, estimate_plan):
        with pytest.raises(EngineError, match=r"compressed-tensors \(8-bit float\).*pip install compressed-tensors"):
            call(EngineConfig(str(folder), device="cpu"))  # type: ignore[operator]


@needs_package
def test_experts_in_compressed_tensors_get_their_scales(tmp_path: Path) -> None:
    folder, worth = store_experts_in_fp8(save_model(tmp_path / "fp8", "qwen3_moe", tie_word_embeddings=False))
    plain = plain_copy(tmp_path / "plain", "qwen3_moe", worth)
    loaded = dict(load_model(EngineConfig(str(folder), device="cpu")).named_parameters())
    for name, parameter in load_model(EngineConfig(str(plain), device="cpu")).named_parameters():
        torch.testing.assert_close(loaded[name], parameter, rtol=1e-6, atol=0)


@needs_package
def test_experts_in_compressed_tensors_keep_their_values_in_fp8(tmp_path: Path) -> None:
    """They are quantised again, with the scales that they had: the same values, up to a rounding of the scale."""
    folder, worth = store_experts_in_fp8(save_model(tmp_path / "fp8", "qwen3_moe", tie_word_embeddings=False))
    model = load_model(EngineConfig(str(folder), device="cpu", precision="fp8"))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, Fp8Experts)
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        got = experts.down[expert].float() * experts.down_scale[expert, :, None]
        torch.testing.assert_close(got, worth[name], rtol=1e-5, atol=0)


@needs_package
def test_four_bits_of_compressed_tensors_are_dequantised(tmp_path: Path) -> None:
    from compressed_tensors.compressors import pack_to_int32

    folder = save_model(tmp_path / "w4a16", "llama", tie_word_embeddings=False)
    tensors, worth = dict(load_file(folder / "model.safetensors")), {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            groups = weight.view(weight.shape[0], -1, 32)
            scale = groups.abs().amax(2, keepdim=True) / 7
            whole = (groups / scale).round().clamp(-8, 7)
            worth[name] = (whole * scale).view_as(weight)
            del tensors[name]
            tensors |= {
                f"{name}_packed": pack_to_int32(whole.view_as(weight).to(torch.int8), 4),
                f"{name}_scale": scale.squeeze(2).contiguous(),
                f"{name}_shape": torch.tensor(weight.shape),
            }
    rewrite(folder, tensors, quantization_config=compressed(INT4, "pack-quantized"))
    plain = plain_copy(tmp_path / "plain", "llama", worth)
    loaded = dict(load_model(EngineConfig(str(folder), device="cpu")).named_parameters())
    for name, parameter in load_model(EngineConfig(str(plain), device="cpu")).named_parameters():
        torch.testing.assert_close(loaded[name], parameter, rtol=1e-5, atol=1e-6)
    about = Engine(EngineConfig(str(folder), device="cpu", arena_tokens=512)).describe()
    assert about["precision"].endswith("weights dequantised from compressed-tensors (4-bit int)")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_other_quantisations_are_refused_with_what_to_use(tmp_path: Path, method: str) -> None:
    folder = save_model(tmp_path, "llama")
    rewrite(folder, load_file(folder / "model.safetensors"), quantization_config={"quant_method": method, "bits": 4})
    for call in (load_model, estimate_plan):
        with pytest.raises(EngineError, match=rf"by '{method}' are not read: use the checkpoint .*GGUF") as caught:
            call(EngineConfig(str(folder), device="cpu"))  # type: ignore[operator]
        assert len(str(caught.value).replace(str(folder), "a/folder")) < 450, "a worker's reason is cut at 500"


# ---- GGUF


def write_gguf(path: Path) -> Path:
    """A tiny Llama as llama.cpp stores it, in float32 and Q8_0, with a tokenizer of whole letters."""
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    words = [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable))), "<|endoftext|>", "<|im_end|>"]
    words.append("ab")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(256)

    def add(name: str, *shape: int, plain: bool = False) -> None:
        values = generator.normal(0, 0.3, shape).astype(np.float32)
        if plain:
            writer.add_tensor(name, values + (1.0 if name.endswith("norm.weight") else 0.0))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(words), 64)
    add("output.weight", len(words), 64)
    add("output_norm.weight", 64, plain=True)
    for layer in ("blk.0.", "blk.1."):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            add(f"{layer}{name}.weight", rows, 64)
            add(f"{layer}{name}.bias", rows, plain=True)
        add(f"{layer}attn_output.weight", 64, 64)
        for name, shape in (("ffn_gate", (96, 64)), ("ffn_up", (96, 64)), ("ffn_down", (64, 96))):
            add(f"{layer}{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            add(f"{layer}{name}.weight", 64, plain=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    import transformers

    file = write_gguf(tmp_path / "tiny-Q8_0.gguf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    plain.save_pretrained(tmp_path / "folder")
    engine = Engine(EngineConfig(str(file), device="cpu", arena_tokens=512))
    assert engine.describe()["precision"] == "fp32, weights dequantised from GGUF"
    got = run(engine, [Request("a", prompts([60])[0], 8)])["a"].token_ids
    assert got == engine_tokens(tmp_path / "folder")
    estimate = estimate_plan(EngineConfig(str(file), device="cpu"))
    assert estimate.weight_bytes == engine.plan().weight_bytes
    assert estimate.max_context == 512
    before = manifest.model_fingerprint(str(file), None)
    rows = summarize(["the cat"], model=file, device="cpu", max_new_tokens=4, question="what").to_pylist()
    assert rows[0]["status"] == "ok", rows[0]["error"]
    assert rows[0]["precision"] == "fp32, weights dequantised from GGUF"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert manifest.model_fingerprint(str(file), None) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", None, "No such file"),
        ("a.gguf", b"<html>", "no GGUF file"),
        ("a-00001-of-00002.gguf", b"GGUF1234", r"llama-gguf-split --merge"),
        ("a.gguf", b"GGUF1234", "pip install gguf"),
    ],
)
def test_gguf_files_that_cannot_be_read_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.setattr(model_files.importlib.util, "find_spec", lambda package: None)
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(JobError, match=message):
        manifest.model_fingerprint(str(file), None)
    with pytest.raises(ModelLoadError, match=message):
        load_config(EngineConfig(str(file), device="cpu"))


# ---- adapters

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")


def save_adapter(folder: Path, base: Path, rank: int = 4) -> Path:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    wrapped.save_pretrained(folder)
    return folder


@needs_peft
def test_an_adapter_is_merged_and_changes_the_job(tmp_path: Path) -> None:
    import peft
    import transformers

    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    got = load_model(EngineConfig(str(base), adapter=str(adapter), device="cpu"))
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(dict(got.named_parameters())[name], parameter.cpu(), rtol=0, atol=1e-6)
    assert engine_tokens(base, adapter=str(adapter)) == engine_tokens(tmp_path / "merged") != engine_tokens(base)
    quantised = load_model(EngineConfig(str(base), adapter=str(adapter), device="cpu", precision="fp8"))
    again = load_model(EngineConfig(str(tmp_path / "merged"), device="cpu", precision="fp8"))
    layer = "model.layers.0.mlp.down_proj"
    assert torch.equal(quantised.get_submodule(layer).weight.float(), again.get_submodule(layer).weight.float())
    with pytest.raises(EngineError, match="random weights, which no adapter is for"):
        load_model(EngineConfig(str(base), adapter=str(adapter), device="cpu", load_format="dummy"))
    prints = manifest.adapter_fingerprint(str(adapter))
    save_adapter(adapter, base, rank=8)
    assert manifest.adapter_fingerprint(str(adapter)) != prints


@needs_peft
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other width", r"size mismatch"),
        ("fewer layers", r"4 of its weights without a place in the model"),
        ("rank", r"size mismatch"),
        ("other names", r"Target modules"),
        ("lost weights", r"1 of its weights missing"),
    ],
)
def test_adapters_of_other_models_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    if kind == "other width":
        base = save_model(tmp_path / "other", "llama", hidden_size=96)
    elif kind == "fewer layers":
        base = save_model(tmp_path / "other", "llama", num_hidden_layers=2)
    elif kind == "lost weights":
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, file)
    else:
        change = {"r": 6} if kind == "rank" else {"target_modules": ["query_key_value"]}
        about = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(about | change))
    with pytest.raises(
        ModelLoadError, match=rf"is not one of this model \(LlamaForCausalLM\): .*({message})"
    ) as caught:
        load_model(EngineConfig(str(base), adapter=str(adapter), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (None, False, "no adapter_config.json there"),
        ({"peft_type": "PROMPT_TUNING"}, True, "PROMPT_TUNING, which is not merged"),
        ({"peft_type": "LORA"}, False, "no adapter_model.safetensors there"),
        ({"peft_type": "LORA"}, True, "pip install peft"),
    ],
)
def test_adapters_that_cannot_be_merged_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, str] | None, weights: bool, message: str
) -> None:
    monkeypatch.setattr(model_files.importlib.util, "find_spec", lambda package: None)
    base, adapter = save_model(tmp_path / "base", "llama"), tmp_path / "adapter"
    for call in (
        lambda: manifest.adapter_fingerprint(str(adapter)),
        lambda: load_config(EngineConfig(str(base), adapter=str(adapter))),
    ):
        with pytest.raises(JobError, match="no such folder"):
            call()
    adapter.mkdir()
    if config is not None:
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        (adapter / "adapter_model.safetensors").touch()
    for call in (
        lambda: manifest.adapter_fingerprint(str(adapter)),
        lambda: load_config(EngineConfig(str(base), adapter=str(adapter))),
    ):
        with pytest.raises(JobError, match=message):
            call()


# ---- context


def test_a_context_is_stretched_as_transformers_does(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", "qwen3", max_position_embeddings=256)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    written = save_model(tmp_path / "yarn", "qwen3", max_position_embeddings=1024, rope_parameters=rope)
    config = EngineConfig(str(plain), device="cpu", rope_scaling=4.0, arena_tokens=1024)
    assert context_limit(load_config(config)) == 1024 == estimate_plan(config).max_context
    prompt = prompts([600])[0]
    got = run(Engine(config), [Request("a", prompt, 8)])["a"].token_ids
    assert got == generate(written, prompt, 8) != generate(plain, prompt, 8)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "already.*linear"),
        ("phi3_longrope", {}, "already.*longrope"),
        ("gemma3", {}, "layers have rotary embeddings of different kinds"),
    ],
)
def test_contexts_that_cannot_be_stretched_are_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    config = EngineConfig(str(save_model(tmp_path, architecture, **changes)), device="cpu", rope_scaling=2.0)
    with pytest.raises(EngineError, match=f"--rope-scaling 2: .*{message}"):
        load_config(config)


def test_the_hinted_factor_makes_room(tmp_path: Path) -> None:
    own = load_config(EngineConfig(str(save_model(tmp_path, "qwen3", max_position_embeddings=256)), device="cpu"))
    assert stretch_hint(own, 256) == ""
    assert stretch_hint(own, 257).startswith("--rope-scaling 1.1 would make room")
    assert stretch_hint(own, 256 * 20) == "", "nobody stretches that far"
    stretch(own, 1.1)
    assert context_limit(own) >= 257
    assert stretch_hint(own, 300) == ""


def test_a_job_says_which_factor_fits(tmp_path: Path, model: Path) -> None:
    limit = context_limit(load_config(EngineConfig(str(model), device="cpu")))
    (tmp_path / "a.txt").write_text("river " * limit)
    settings: dict[str, Any] = {"model": str(model), "device": "cpu", "max_new_tokens": 4}
    rows = summarize(["river " * limit], **settings).to_pylist()
    assert rows[0]["status"] == "too_long"
    assert "--rope-scaling" in rows[0]["error"]
    assert f"made for {limit:,} tokens" in rows[0]["error"]
    for context in (512, limit):
        capped = summarize(["river " * limit], **settings, max_context=context).to_pylist()
        assert "--rope-scaling" not in capped[0]["error"]
    config = JobConfig(input=(str(tmp_path / "a.txt"),), output=str(tmp_path / "out"), **settings)
    lines = list(describe_plan(config))
    assert any(line.startswith("longest document: --rope-scaling") for line in lines), lines


def test_rows_and_fingerprints_know_adapter_and_scaling(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "org/name", "input": ("a",), "output": "b"}
    plain, scaled = JobConfig(**settings), JobConfig(**settings, rope_scaling=2)
    assert plain.fingerprint() != scaled.fingerprint()
    assert "rope_scaling" not in plain.output_settings()
    assert model_label(plain) == "org/name"
    assert model_label(JobConfig(**settings, rope_scaling=2, adapter="lora/x")) == "org/name + lora/x (YaRN 2)"
    engine = make_engine_config(JobConfig(**settings, adapter="lora/x"), "cpu")
    assert engine.adapter == str(Path("lora/x").absolute())
    with pytest.raises(JobError, match="--rope-scaling must be above 1"):
        JobConfig(**settings, rope_scaling=1)


# ---- what transformers says of configs


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("requires you to execute the code; set the option `trust_remote_code=True`"),
            "--trust-remote-code",
        ),
        (OSError("v9 is not a valid git identifier (branch name, tag name or commit id)"), "not revision 'v9'"),
        (OSError("You are trying to access a gated repo."), "hf auth login"),
        (
            ValueError("has model type `qwen9` but Transformers does not recognize this architecture"),
            "does not know the model type qwen9: pip install -U transformers",
        ),
        (
            OSError("We couldn't connect to 'https://huggingface.co' to load the files"),
            "hf download org/name --local-dir",
        ),
        (OSError("no route to host"), "^$"),
    ],
)
def test_failures_of_configs_name_the_flag_that_helps(error: Exception, message: str) -> None:
    assert re.search(message, model_files.config_problem(error, "org/name", "v9"))


def test_a_folder_that_is_mistyped_is_told_the_name_it_is_like(tmp_path: Path) -> None:
    (tmp_path / "tiny-reader").mkdir()
    (tmp_path / "tiny-reade.txt").touch()
    error = OSError("We couldn't connect to 'https://huggingface.co' to load the files")
    assert model_files.config_problem(error, str(tmp_path / "tiny-reade"), None).endswith("did you mean 'tiny-reader'?")


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(model: str, *_: object) -> None:
        asked.append(model)
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr("pipeline.engine.model.loading.read_config", unreachable)
    monkeypatch.setattr("pipeline.engine.model.loading.check_hub", lambda config: asked.append("for an adapter"))
    with pytest.raises(ModelLoadError, match="the hub cannot be reached"):
        load_config(EngineConfig("org/name", device="cpu"))
    assert asked == ["org/name"]
