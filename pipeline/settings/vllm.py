"""Names of vLLM and Ray Data LLM for what a job sets: errors and docs/configuration.md lead from them to ours."""

from __future__ import annotations

# Engine arguments, sampling parameters and flags of vLLM, by which of our settings does what they do.
OURS = {
    "tensor_parallel_size": "gpus_per_worker",
    "tp": "gpus_per_worker",
    "pipeline_parallel_size": "gpus_per_worker",
    "pp": "gpus_per_worker",
    "data_parallel_size": "workers",
    "dp": "workers",
    "concurrency": "workers",
    "max_model_len": "max_context",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "truncate_prompt_tokens": "too_long",
    "dtype": "precision",
    "quantization": "precision",
    "kv_cache_dtype": "precision",
    "gpu_memory_utilization": "arena_tokens",
    "kv_cache_memory_bytes": "arena_tokens",
    "max_num_seqs": "max_live",
    "batch_size": "max_live",
    "max_num_batched_tokens": "chunk_tokens",
    "enable_chunked_prefill": "chunk_tokens",
    "enable_lora": "adapter",
    "lora_modules": "adapter",
    "guided_json": "schema",
    "guided_decoding": "schema",
    "structured_outputs": "schema",
    "response_format": "schema",
    "chat_template_kwargs": "chat_template_args",
    "reasoning_parser": "thinking",
    "model_source": "model",
    "input_file": "input",
    "i": "input",
    "output_file": "output",
    "o": "output",
}
_NOT_SERVED = "nothing is served: a job reads its input, writes its output and ends"
_BY_ITSELF = "this is chosen without a setting"
_MAKE_ROOM = "weights and KV stay on the GPUs; --precision fp8 and --gpus-per-worker make room there"
_NO_TOKENS = "single tokens are neither forced nor forbidden; --schema holds answers to a form"
_ENDS = "an output ends where the model ends it, at a --stop, or at --max-new-tokens"
_BY_NAME = "settings are given one by one, by the names of the flags"
# What no setting of ours does, with what there is in its place.
NOT_HERE = {
    "enable_prefix_caching": "questions to one document always share its reading (give --question several times); "
    "documents share nothing",
    "speculative_config": "there is no draft model; --prompt-lookup auto takes drafts from the document, as "
    "vLLM's ngram does",
    "presence_penalty": "--repetition-penalty is the only penalty",
    "frequency_penalty": "--repetition-penalty is the only penalty",
    "n": "each question to a document has one output",
    "best_of": "each question to a document has one output",
    "logprobs": "probabilities are not given out",
    "prompt_logprobs": "probabilities are not given out",
    "logit_bias": _NO_TOKENS,
    "bad_words": _NO_TOKENS,
    "min_tokens": _ENDS,
    "ignore_eos": _ENDS,
    "stop_token_ids": _ENDS,
    "tokenizer": "the tokenizer is the model's own",
    "chat_template": "the chat template is the model's own; --prompt-file makes the user's message",
    "hf_overrides": "of the model's config only the context can be stretched, by --rope-scaling FACTOR",
    "generation_config": "--temperature and its like say how to sample; unset, outputs are greedy",
    "download_dir": "HF_HOME in the environment says where the hub's files go",
    "cpu_offload_gb": _MAKE_ROOM,
    "swap_space": _MAKE_ROOM,
    "enforce_eager": _BY_ITSELF,
    "attention_backend": _BY_ITSELF,
    "compilation_config": _BY_ITSELF,
    "limit_mm_per_prompt": "images and sounds are not read",
    "served_model_name": _NOT_SERVED,
    "host": _NOT_SERVED,
    "port": _NOT_SERVED,
    "api_key": _NOT_SERVED,
    "engine_kwargs": _BY_NAME,
    "sampling_params": _BY_NAME,
}
