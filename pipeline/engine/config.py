"""What goes into the engine and what comes out: configuration, requests, completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pipeline.errors import JobError
from pipeline.results.rows import EngineFields
from pipeline.settings.shared import EngineSettings, Sampling
from stem_core.config import StemConfig
from stem_core.settings import check_all, setting

if TYPE_CHECKING:
    import torch

    from pipeline.answers.grammar import Grammar

__all__ = [
    "Completion",
    "EngineConfig",
    "EngineError",
    "ModelRefusedError",
    "Request",
    "Sampling",
    "SharedPrompt",
    "SoFar",
    "Status",
]

Status = Literal["ok", "error", "oom", "too_long"]


class SoFar(NamedTuple):
    """How far a request is, or a document with all its requests.

    read, written: tokens of the prompt, and of the output. prefill_seconds: of prompts and prefixes that are read to
    their end.
    decode_seconds: of its steps. size_bytes: of a document, as its listing has it; 0 for a request.
    """

    read: int
    written: int
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    size_bytes: int = 0

    def and_(self, other: SoFar) -> SoFar:
        """Both together."""
        return SoFar(
            self.read + other.read,
            self.written + other.written,
            self.prefill_seconds + other.prefill_seconds,
            self.decode_seconds + other.decode_seconds,
            self.size_bytes + other.size_bytes,
        )


class EngineError(JobError):
    """The engine cannot be built or cannot go on; the message says why and what to change."""


class ModelRefusedError(EngineError):
    """No engine runs the model, on whatever device: its attention, or the form of its weights, is not supported, or not
    in the precision asked for.
    """


@dataclass(frozen=True)
class EngineConfig(EngineSettings):
    """How one engine holds and runs a model: the settings of pipeline.settings.shared, and what the job decides.

    device: "auto" (the first GPU, else the CPU) or a torch device name.
    gpus: how many GPUs, `device` and those that follow it, hold the model: its layers are spread over them in order.
    attention: sparse prefill; None is dense attention through the same kernels.
    seed: of the dummy weights.
    fp8_fast_accumulation: let fp8 linears sum in the tensor cores' reduced precision (Hopper): faster, less exact.
        Decode steps of up to 64 rows sum precisely all the same, but for experts.
    fuse: run norms, MLPs, projections and rotary embeddings through our kernels; None does on a GPU and in fp8.
    cuda_graphs: replay captured decode steps (GPU only).
    decode_lag: decode steps that the host may launch ahead of the tokens that it has read back; steps launched for a
        document that has stopped are discarded. None is 2 on a GPU, 0 on the CPU. Results do not depend on it.
    grammars: requests may have a grammar; the decode steps that this takes are made ready, too.
    """

    device: str = "auto"
    gpus: int = setting(1, "GPUs that the layers are spread over", low=1)
    attention: StemConfig | None = None
    seed: int = 0
    fp8_fast_accumulation: bool = True
    fuse: bool | None = None
    cuda_graphs: bool = True
    decode_lag: int | None = setting(None, "decode steps ahead of the host", low=0)
    grammars: bool = False

    def __post_init__(self) -> None:
        check_all(self)

    def torch_device(self) -> torch.device:
        """The device to run on. Raises EngineError for a name that torch does not know or a GPU that is not there."""
        import torch

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
        import torch

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
class Request:
    """One document. prompt_ids: token ids; stop_ids end the output besides the model's own end-of-sequence ids.

    chunk_tokens: prefill steps of this document at most so long; None: as EngineConfig says.
    grammar: what the output is held to, from its first token on; it stops where nothing more can follow, too.
    until: asked after every token, with all that were generated: True ends the output there. It must depend on them
        alone; what it raises ends this document with an error.
    """

    request_id: str
    prompt_ids: Sequence[int] | np.ndarray
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    chunk_tokens: int | None = None
    grammar: Grammar | None = None
    until: Callable[[list[int]], bool] | None = None


@dataclass(frozen=True)
class SharedPrompt:
    """One document and several questions to it: prompts that begin with the same tokens.

    prefix_ids: token ids of the document part, at least one. requests: at least one; the prompt_ids of each are what
    stands behind the prefix, at least one token.

    The prefix is read once, as its own length asks for (budgets, reasons, frequencies of LongRoPE), so that nothing
    depends on what is asked or how often; what stands behind it is read densely. All requests see one copy of its keys
    and values. A request alone is cut and read in the same way: its output is the same with others and without, on a
    GPU up to the rounding of sums in another order.
    """

    prefix_ids: Sequence[int] | np.ndarray
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Completion(EngineFields):
    """What became of a request, with what was measured of it (pipeline.results.rows.EngineFields).

    token_ids: generated tokens, the stop token included (as transformers' generate returns them).
    finish_reason: "stop" (a stop token, or the grammar allows nothing more), "stop_string" (Request.until), "length"
        (max_new_tokens reached) or "error".
    attention and what follows from it: None for one that never started.
    output_error: of sparse prefill, in the sampled query block that is furthest from dense attention (see
    stem_core.output_error), mean over its rows and the sparse layers; None if nothing was measured.
    queue_seconds: from add() to the first prefill step. prefill_seconds, decode_seconds: wall time of the engine's
    prefill steps of this document and of the decode steps that it took part in; the time in which it waits for other
    documents' prefill is in neither.
    peak_gpu_bytes: of the engine's GPUs together.
    prefix_tokens: tokens of the prompt that were read for another request already (SharedPrompt); 0 for the request
    that pays for them, and for one that shares nothing.

    Of a SharedPrompt, prompt_tokens counts prefix and tail, attention and what follows from it are those of the prefix,
    and the seconds in which the prefix was read are in prefill_seconds and time_to_first_token of that request alone
    which ends first of those that share it: so sums of prefill_seconds, and of prompt_tokens - prefix_tokens, are what
    was read. queue_seconds then are those from add_shared() to the first step of the request's own, less that time.
    """

    request_id: str
    status: Status
    error: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "error"
    queue_seconds: float = 0.0
