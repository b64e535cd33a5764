"""Qwen3 for training: the mathematics of transformers' Qwen3ForCausalLM on flattened tokens.

Activations are [B * L, C], as many at every sequence length, so torch.compile compiles each piece once; only attention
sees documents, [B, L].
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_demo_model.documents import BOS, END, PAD
from tools.train_demo_model.tokenizer import FILES

EPS = 1e-6
CONTEXT = 40_960


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are models/tiny-reader's. qk_gain: what the QK norms start at."""

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    rope_theta: float = 1e7
    qk_gain: float = 1.2


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return ((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def queries_keys_values(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, C] -> q [T, H, D], k, v [T, Hkv, D]."""
    projected = rms_norm(x, norm) @ torch.cat((wq, wk, wv)).to(x.dtype).T
    q, k, v = projected.split((wq.shape[0], wk.shape[0], wv.shape[0]), -1)
    dim = q_norm.numel()
    q, k = rms_norm(q.unflatten(-1, (-1, dim)), q_norm), rms_norm(k.unflatten(-1, (-1, dim)), k_norm)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.unflatten(-1, (-1, dim)).contiguous()


def after_attention(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The rest of a layer: output projection and MLP."""
    x = x + attended @ wo.to(x.dtype).T
    g, u = (rms_norm(x, norm) @ torch.cat((gate, up)).to(x.dtype).T).chunk(2, -1)
    return x + (F.silu(g) * u) @ down.to(x.dtype).T


def weighted_loss(x: Tensor, norm: Tensor, embedding: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of rows x [R, C], and which of them have the right argmax."""
    logits = (rms_norm(x, norm) @ embedding.to(x.dtype).T).float()
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum(), logits.argmax(-1) == target


NAMES = {
    "input_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class Reader(nn.Module):
    """Parameters in float32, activations in bfloat16 on a GPU. `compile_pieces` before training there."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def linear(rows: int, columns: int, size: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * size / math.sqrt(columns))

        def gains(count: int, value: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.full((count,), value))

        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, hidden) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ParameterDict(
                {
                    "input_norm": gains(hidden),
                    "wq": linear(q, hidden),
                    "wk": linear(kv, hidden),
                    "wv": linear(kv, hidden),
                    "q_norm": gains(shape.head_dim, shape.qk_gain),
                    "k_norm": gains(shape.head_dim, shape.qk_gain),
                    "wo": linear(hidden, q, 0.0),
                    "mlp_norm": gains(hidden),
                    "gate": linear(shape.mlp, hidden),
                    "up": linear(shape.mlp, hidden),
                    "down": linear(hidden, shape.mlp, 0.0),
                }
            )
            for _ in range(shape.layers)
        )
        self.norm = gains(hidden)
        rates = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
        angles = torch.arange(CONTEXT).double()[:, None] * rates
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self._before: Callable[..., Any] = queries_keys_values
        self._after: Callable[..., Any] = after_attention
        self._loss: Callable[..., Any] = weighted_loss

    def compile_pieces(self) -> None:
        self._before, self._after, self._loss = (
            torch.compile(piece, dynamic=False) for piece in (self._before, self._after, self._loss)
        )

    def forward(
        self, ids: Tensor, positions: Tensor, rows: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ids, positions int64 [B, L]; rows int64 [R] of the flattened tokens -> loss, and bool [R] of right ones."""
        B, L = ids.shape
        x = F.embedding(ids.flatten(), self.embedding).to(torch.bfloat16 if ids.is_cuda else torch.float32)
        rows_of = positions.flatten()
        cos, sin = self.cos[rows_of][:, None], self.sin[rows_of][:, None]
        for block in self.blocks:
            assert isinstance(block, nn.ParameterDict)
            weights = [block[name] for name in ("input_norm", "wq", "wk", "wv", "q_norm", "k_norm")]
            q, k, v = (
                part.view(B, L, -1, self.shape.head_dim).transpose(1, 2) for part in self._before(x, cos, sin, *weights)
            )
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).reshape(B * L, -1)
            x = self._after(x, out, *(block[name] for name in ("wo", "mlp_norm", "gate", "up", "down")))
        return self._loss(x[rows], self.norm, self.embedding, target, weight)

    def export(self, folder: Path, tokenizer: Path) -> None:
        """Write a transformers model folder: stock Qwen3ForCausalLM in bfloat16, with the tokenizer."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, nn.ParameterDict)
            for name, parameter in block.items():
                tensors[f"model.layers.{layer}.{NAMES[name]}.weight"] = parameter
        stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self._config(), indent=1) + "\n")
        special = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
        (folder / "generation_config.json").write_text(json.dumps({**special, "do_sample": False}) + "\n")
        for file in FILES:
            if (tokenizer / file).exists() and tokenizer.resolve() != folder.resolve():
                shutil.copyfile(tokenizer / file, folder / file)

    def _config(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "vocab_size": shape.vocabulary,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.mlp,
            "hidden_act": "silu",
            "rms_norm_eps": EPS,
            "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": BOS,
            "eos_token_id": END,
            "pad_token_id": PAD,
        }
