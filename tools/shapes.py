"""Write the config of a model shape, for --load-format dummy: python -m tools.shapes SHAPE FOLDER"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cli import Parser, run_main
from jobs.measurement import dummy_copy, dummy_folder
from pipeline.errors import JobError

# Room for 128K tokens of prompt and the output behind them; positions cost nothing.
POSITIONS = 1 << 18
# The published configs, without end-of-sequence ids: random weights would end an output anywhere.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14_336,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28_672,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12_288,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 12_288,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gemma-4-26b-a4b": {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "intermediate_size": 2112,
        "enable_moe_block": True,
        "moe_intermediate_size": 704,
        "num_experts": 128,
        "top_k_experts": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 150_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
ALIASES = {"llama-8b": "llama-3.1-8b"}


def shape_folder(shape: str, folder: Path) -> Path:
    """A folder with the config.json of a named shape, or of a model folder, for load_format "dummy".

    Raises JobError for a name that is neither.
    """
    shape = ALIASES.get(shape, shape)
    if shape in SHAPES:
        return dummy_folder(SHAPES[shape], folder)
    if (Path(shape) / "config.json").is_file():
        return dummy_copy(shape, folder)
    raise JobError(f"{shape!r} is neither {', '.join(SHAPES)} nor a folder with a config.json")


def main(arguments: Sequence[str]) -> int:
    """Write the folder; the exit code."""
    parser = Parser(prog="python -m tools.shapes", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("shape", metavar="SHAPE", help=f"{', '.join((*SHAPES, *ALIASES))}, or a model's folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where its config.json is written")
    flags = parser.parse_args(arguments)
    print(shape_folder(flags.shape, flags.folder) / "config.json")
    return 0


if __name__ == "__main__":
    run_main(main)
