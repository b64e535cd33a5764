"""From a path or hub id to a model on its devices, checked and ready to be called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.devices import GIB, shares
from pipeline.engine.laps import Laps
from pipeline.engine.model.adapter import check_adapter, merge_adapter
from pipeline.engine.model.checkpoint import (
    ModelLoadError,
    check_folder,
    check_hub,
    conversion_problem,
    keys_problem,
    load_report,
    pickle_problem,
    unscaled_weights,
)
from pipeline.engine.model.dummy import dummy_model
from pipeline.engine.model.files import read_config, weight_files
from pipeline.engine.model.meta_model import checked_architecture, chunk_bytes, meta_model
from pipeline.engine.model.placement import Placement, connect, move, place, whole
from pipeline.engine.model.precision import Precision, resolve_precision
from pipeline.engine.model.requirements import named_failures
from pipeline.engine.model.rope import stretch
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.model.self_check import is_tested, self_check
from pipeline.engine.model.text_part import model_class
from pipeline.model_files import config_problem, is_gguf
from stem_core.errors import first_line
from stem_core.fp8 import Fp8Linear, prepare_quantized_config, quantize_linears, sensitive_linears, storage

# A context that no arena reaches, for configs that state none.
UNBOUNDED = 1 << 40


def load_runner(
    config: EngineConfig,
    devices: Sequence[torch.device] | None = None,
    compile_kernels: Callable[[ModelRunner], None] | None = None,
) -> ModelRunner:
    """The model of `config` on its devices, or on the given ones; compile_kernels: see ModelRunner.

    Raises EngineError (ModelLoadError for its files).
    """
    laps = Laps()
    model = load_model(config, devices)
    laps.end("weights")
    try:
        runner = ModelRunner(model, config.attention, config.fuse, laps, compile_kernels)
        runner.weights = stored_weights(config, load_config(config))
        if not is_tested(runner):
            with named_failures(model):
                self_check(runner, random_weights=config.load_format == "dummy")
            laps.end("self check")
        return runner
    except (ValueError, AttributeError) as error:
        raise EngineError(f"model {config.model!r} cannot run here: {error}") from error


def load_config(config: EngineConfig) -> Any:
    """The transformers config of `config.model`, its context stretched if that is asked for. Raises ModelLoadError, or
    EngineError for a context that cannot be stretched.
    """
    check_folder(config.model)
    if config.adapter is not None:
        check_adapter(config.adapter)
    try:
        hf_config = read_config(config.model, config.revision, config.trust_remote_code)
    except Exception as error:
        why = config_problem(error, config.model, config.revision)
        if not why:  # not asked of a hub that was not reached
            check_hub(config)
            why = first_line(error, 1000)
        raise ModelLoadError(f"cannot read the config of model {config.model!r}: {why}") from error
    check_hub(config)
    if config.rope_scaling is not None:
        stretch(hf_config, config.rope_scaling)
    return hf_config


def load_precision(config: EngineConfig) -> Precision:
    """What `config.precision` means here for this model. Raises EngineError (see resolve_precision)."""
    return resolve_precision(config.precision, config.torch_device(), load_config(config))


def load_model(config: EngineConfig, devices: Sequence[torch.device] | None = None) -> nn.Module:
    """The model in eval mode on the engine's devices, its linears in fp8 if that is the precision.

    devices: of the stages that its layers are divided into (pipeline.engine.model.placement); None is the config's.
    Reads safetensors, GGUF, and pytorch_model.bin as tensors alone. An adapter is merged before anything is quantised.
    load_format "dummy" makes random weights on the devices (pipeline.engine.model.dummy).
    Neither needs a second copy in host memory, nor, for fp8, device memory for more than one weight in 16 bits.
    Raises ModelLoadError, EngineError for a precision that cannot be and a model that cannot be divided, and
    ModelRefusedError before any weights are read.
    """
    devices = config.torch_devices() if devices is None else tuple(devices)
    hf_config = load_config(config)
    precision = resolve_precision(config.precision, devices[0], hf_config)
    try:
        checked_architecture(config, hf_config, precision)
        placement = _placement(config, hf_config, precision, devices)
        stored_fp8 = prepare_quantized_config(hf_config)
        if config.load_format == "dummy":
            if config.adapter is not None:
                raise EngineError(
                    "load_format 'dummy' has random weights, which no adapter is for: leave one of them out"
                )
            model = dummy_model(config, hf_config, precision, placement)
        else:
            model = _from_files(config, hf_config, precision, stored_fp8, placement)
        move(model, placement)
        connect(model, placement)
    except torch.OutOfMemoryError as error:
        sizes = {str(d): torch.cuda.get_device_properties(d).total_memory / GIB for d in devices}
        cards = " and ".join(f"the {size:.0f} GiB of {name}" for name, size in sizes.items())
        raise ModelLoadError(f"model {config.model!r} does not fit {cards}") from error
    except EngineError:
        raise
    except Exception as error:
        raise ModelLoadError(f"cannot load model {config.model!r}: {first_line(error, 1000)}") from error
    return model.eval().requires_grad_(False)


def _placement(
    config: EngineConfig, hf_config: Any, precision: Precision, devices: Sequence[torch.device]
) -> Placement:
    """What the devices have free decides where the model is divided; one of them takes it without a look at either."""
    if len(devices) == 1:
        return whole(devices[0])
    there = shares(devices, chunk_bytes(config, hf_config, precision))
    return place(meta_model(config, hf_config, precision), devices, there)


def _from_files(
    config: EngineConfig, hf_config: Any, precision: Precision, stored_fp8: bool, placement: Placement
) -> nn.Module:
    # Weights that are to be quantised come to host memory and go to their devices one by one, in fp8.
    to_quantize = precision.fp8 and not stored_fp8
    auto = model_class(hf_config, config.trust_remote_code)
    several = len(placement.devices) > 1
    if config.adapter is not None and stored_fp8:
        raise ModelLoadError(
            f"adapter {config.adapter!r}: it cannot be merged into a checkpoint whose weights are in fp8: use the one "
            "in bf16, with precision fp8 to make it smaller"
        )
    place, more = weight_files(config.model)
    with _unconnected() if several else nullcontext(), load_report() as report:
        try:
            model, found = auto.from_pretrained(
                place,
                **more,
                config=hf_config,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=precision.dtype,
                device_map=placement.device_map() if placement.devices[0].type != "cpu" and not to_quantize else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
        except (RuntimeError, UnpicklingError) as error:
            problem = conversion_problem(report) or pickle_problem(error)
            if not problem:
                raise
            raise ModelLoadError(f"model {config.model!r}: {problem}") from error
    quantised = getattr(hf_config, "quantization_config", None) is not None
    problem = keys_problem(found) or ("" if quantised else unscaled_weights(config.model))
    if problem:
        raise ModelLoadError(f"model {config.model!r}: {problem}")
    if quantised and not stored_fp8:
        _convert_rest(model, precision.dtype)
    if config.adapter is not None:
        model = merge_adapter(model, config.adapter)
    if to_quantize:
        return quantize_linears(
            model,
            sensitive_linears(model),
            fast_accumulation=config.fp8_fast_accumulation,
            device=placement.device_of,
        )
    for module in model.modules():  # those of a checkpoint that is stored in fp8
        if isinstance(module, Fp8Linear):
            module.fast_accumulation = config.fp8_fast_accumulation
    return model


def _convert_rest(model: Any, dtype: torch.dtype) -> None:
    """Bring the weights that a quantised checkpoint holds in 16 or 32 bits to `dtype`.

    transformers leaves them as stored where it dequantises the others. It knows of some that must stay in float32.
    """
    exact = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if not exact.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def stored_weights(config: EngineConfig, hf_config: Any) -> str:
    """What a checkpoint's weights were dequantised from when they were loaded; empty if they are as stored."""
    if config.load_format == "dummy":
        return ""
    if is_gguf(config.model):
        return "GGUF"
    stored = storage(hf_config)
    return "" if stored is None or stored.kept else stored.name


@contextmanager
def _unconnected() -> Iterator[None]:
    """Inside, transformers loads onto several devices without accelerate's hooks, whose work `connect` does.

    Raises AttributeError where this transformers has no such step any more.
    """
    from transformers import modeling_utils

    dispatch = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = dispatch


def stop_token_ids(model: nn.Module) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config, or else of the model config; sorted. Raises ModelLoadError."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for source in (getattr(model, "generation_config", None), text):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found = [ids] if isinstance(ids, int) else ids
            if not isinstance(found, list | tuple) or not all(isinstance(one, int) for one in found):
                raise ModelLoadError(
                    f"eos_token_id of the model's {'generation_config' if source is not text else 'config'}.json must "
                    f"be a token id or a list of them, got {ids!r}"
                )
            return tuple(sorted(set(found)))
    return ()


def context_limit(hf_config: Any) -> int:
    """Most positions that the model was made for: its config's, or those of its RoPE scaling where they are more."""
    text = hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return UNBOUNDED
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for scaling in scalings:
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if factor and original:
            limit = max(limit, math.floor(factor * original))
    return limit
