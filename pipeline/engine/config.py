"""What goes into the engine and what comes out: configuration, requests, completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch

from pipeline.errors import JobError
from stem_core.config import StemConfig

Status = Literal["ok", "error", "oom", "too_long"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(PrecisionName)
LOAD_FORMATS = ("auto", "dummy")


class EngineError(JobError):
    """The engine cannot be built or cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class EngineConfig:
    """How one engine holds and runs a model.

    model: path of a model folder, or a hub id.
    device: "auto" (the first GPU, else the CPU) or a torch device name.
    gpus: how many GPUs, `device` and those that follow it, hold the model: its layers are spread over them in order.
    precision: "bf16", "fp16" or "fp32" of everything; "fp8": linears, attention and KV in fp8 (e4m3), the rest in bf16,
        on a CPU in fp32; "auto": bf16 on a GPU, fp32 on a CPU, fp8 for a checkpoint that is stored in fp8.
    fp8_fast_accumulation: let fp8 linears sum in the tensor cores' reduced precision (Hopper): faster, less exact.
    attention: sparse prefill; None is dense attention through the same kernels.
    chunk_tokens: prompt tokens per prefill step; rounded up to whole blocks of the attention. The default is 132 blocks
        of 128: an H100 has 132 multiprocessors, so that tiles fill whole rounds of them (measured, Llama-3.1-8B in fp8,
        128K tokens: 3% sooner than steps of 8192).
    max_live: documents that hold KV at the same time, i.e. the largest decode batch.
    arena_tokens: tokens of KV in all; None takes what the free memory holds.
    max_context: most tokens of one document, prompt and output; None asks the model's config.
    load_format: "auto" reads safetensors; "dummy" makes random weights on the device from the config alone.
    revision, trust_remote_code: as in transformers.
    seed: of the dummy weights.
    fuse: run norms, MLPs, projections and rotary embeddings through our kernels; None does on a GPU and in fp8.
    cuda_graphs: replay captured decode steps (GPU only).
    decode_lag: decode steps that the host may launch ahead of the tokens that it has read back; steps launched for a
        document that has stopped are discarded. None is 2 on a GPU, 0 on the CPU. Results do not depend on it.
    """

    model: str
    device: str = "auto"
    gpus: int = 1
    precision: str = "auto"
    attention: StemConfig | None = None
    chunk_tokens: int = 16896
    max_live: int = 8
    arena_tokens: int | None = None
    max_context: int | None = None
    load_format: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    fp8_fast_accumulation: bool = True
    fuse: bool | None = None
    cuda_graphs: bool = True
    decode_lag: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.load_format not in LOAD_FORMATS:
            raise ValueError(f"load_format must be one of {LOAD_FORMATS}, got {self.load_format!r}")
        for name in ("gpus", "chunk_tokens", "max_live"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("arena_tokens", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} must be at least 2 tokens (one of prompt, one of output), got {value}")
        if self.decode_lag is not None and self.decode_lag < 0:
            raise ValueError(f"decode_lag must not be negative, got {self.decode_lag}")

    def torch_device(self) -> torch.device:
        """The device to run on. Raises EngineError for a name that torch does not know or a GPU that is not there."""
        if self.device == "auto":
            return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise EngineError(
                f"device={self.device!r} is not a device of torch: use auto, cpu, cuda or cuda:N"
            ) from error
        if device.type != "cuda":
            return device
        if not torch.cuda.is_available():
            raise EngineError(f"device={self.device!r} asked for, but torch sees no CUDA device; use device='cpu'")
        if (device.index or 0) >= torch.cuda.device_count():
            raise EngineError(
                f"device={self.device!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", device.index or 0)

    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices that the layers are spread over, in order. Raises EngineError as torch_device() does, and where
        there are not enough GPUs.
        """
        first = self.torch_device()
        if self.gpus == 1:
            return (first,)
        if first.type != "cuda":
            raise EngineError(f"a model is spread over GPUs only, but gpus={self.gpus} was asked for on {first}")
        there = torch.cuda.device_count() - first.index
        if there < self.gpus:
            raise EngineError(f"gpus={self.gpus} asked for, but torch sees {there} CUDA devices from {first} on")
        return tuple(torch.device("cuda", first.index + i) for i in range(self.gpus))


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p keeps the smallest set of most likely tokens whose probability reaches it.

    The random numbers of a document come from `seed` and its request id alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Request:
    """One document. prompt_ids: token ids; stop_ids end the output besides the model's own end-of-sequence ids.

    chunk_tokens: prefill steps of this document at most so long; None: as EngineConfig says.
    """

    request_id: str
    prompt_ids: Sequence[int] | np.ndarray
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    token_ids: generated tokens, the stop token included (as transformers' generate returns them).
    finish_reason: "stop" (a stop token), "length" (max_new_tokens reached) or "error".
    attention: "stem" or "dense" as it ran for this document, empty for one that never started. attention_reason: why
    it is not the one asked for, empty if it is.
    density: computed share of the causal block pairs over all layers and heads; 1.0 is dense. A layer with a sliding
    window that cuts the prompt counts with what the window meets. density_by_layer: of each layer, in the model's
    order; empty for a document that never started.
    output_error: of sparse prefill, in the sampled query block that is furthest from dense attention (see
    stem_core.output_error), mean over its rows and the sparse layers; None if nothing was measured.
    queue_seconds: from add() to the first prefill step. prefill_seconds, decode_seconds: wall time of the engine's
    prefill steps of this document and of the decode steps that it took part in; the time in which it waits for other
    documents' prefill is in neither. time_to_first_token: from add().
    peak_bytes: most memory allocated on the engine's GPUs while the document was there, theirs together; 0 on a CPU.
    """

    request_id: str
    status: Status
    error: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "error"
    prompt_tokens: int = 0
    output_tokens: int = 0
    attention: str = ""
    attention_reason: str = ""
    density: float = 1.0
    density_by_layer: tuple[float, ...] = ()
    output_error: float | None = None
    kernel: str = ""
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token: float = 0.0
    peak_bytes: int = 0
