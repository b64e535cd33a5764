"""Tiny random models on disk, and what transformers itself generates with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pipeline.engine import Completion, Engine, Request

VOCABULARY = 199
TINY_READER = Path(__file__).parents[2] / "models" / "tiny-reader"

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide weights keep the tokens of a random model apart: near-ties would turn on rounding.
    "initializer_range": 0.3,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 128,
    "factor": 16.0,
}
GPT_OSS_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 70}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 1.0}),
    "granite": ("GraniteConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 70, "query_pre_attn_scalar": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 70, "layer_types": GPT_OSS_LAYERS},
    ),
    "gemma2": ("Gemma2Config", {}),
    "phi3_longrope": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
}


def save_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """A random float32 model of one of ARCHITECTURES, saved as a folder."""
    name, extra = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**(COMMON | extra | changes))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Biases start at zero, where a forgotten bias would go unnoticed.
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif parameter_name.endswith("sinks"):
                parameter.normal_(0.0, 2.5)  # some heads keep most for their sink, some nothing
    model.save_pretrained(folder)
    return folder


def prompts(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Random token ids, special ones left out."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, size=length) for length in lengths]


def generate(
    folder: Path, prompt: np.ndarray, max_new_tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[int]:
    """Greedy tokens of transformers' generate, one document alone; with sdpa attention, or eager for sinks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.config._attn_implementation == ("eager" if model.config.model_type == "gpt_oss" else "sdpa")
    ids = torch.as_tensor(prompt, device=device)[None]
    mask = torch.ones_like(ids)
    out = model.to(device).eval().generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def run(engine: Engine, requests: list[Request], max_steps: int = 10_000) -> dict[str, Completion]:
    """All requests to their end, by id."""
    for request in requests:
        engine.add(request)
    done: dict[str, Completion] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return done
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
    raise AssertionError(f"the engine still has work after {max_steps} steps")


def last_logits(engine: Engine, prompt: np.ndarray) -> torch.Tensor:
    """Logits after the whole prompt, float64 on the host."""
    seen: list[torch.Tensor] = []
    logits = engine._runner.logits

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(logits(*args, **kwargs))
        return seen[-1]

    engine._runner.logits = spy  # type: ignore[method-assign]
    assert run(engine, [Request("a", prompt, 1)])["a"].status == "ok"
    return seen[-1].double().cpu()
