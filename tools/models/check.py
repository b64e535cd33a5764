"""One model type: a tiny random model of it, read and continued here and by transformers itself."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.engine import Completion, Engine, EngineConfig, EngineError, Request
from pipeline.engine.model.runner import ModelRunner
from stem_core.config import StemConfig
from stem_core.errors import first_line
from stem_core.fp8 import experts_obstacle, find_experts
from tools.models.tiny import VOCABULARY, randomize, tiny_config

NEW_TOKENS = 10
# Prompts that are read in several chunks, the last of them short or of one token, and decoded together.
LENGTHS = (499, 130, 257)
CHUNK = 128
MOST_PARAMETERS = 60e6
SPARSE = StemConfig(
    schedule="density", density=0.3, block_size=16, dense_layers=0, sink_blocks=1, local_blocks=2, dense_below=0
)


@dataclass(frozen=True)
class Checked:
    """What became of a model type.

    status: "stem", "dense" (every layer has a window, so that Stem leaves all of them alone), "refused", "untested"
    (no tiny model could be made, or transformers itself cannot run it here), "wrong" (other tokens than transformers').
    reason: of the last three. sparse: "4 of 4 layers". fp8: "yes", "not its experts" or "no", of --precision fp8.
    """

    model_type: str
    status: str
    reason: str = ""
    sparse: str = ""
    fp8: str = ""

    def to_dict(self) -> dict[str, str]:
        """Fields as plain values."""
        return asdict(self)


def check_type(model_type: str, device: str = "cpu") -> Checked:
    """Build, save, run and compare; raises nothing that the model is the cause of.

    device: that the engine runs on, in float32; transformers stays on the CPU. On a GPU the reason tells where decode
    steps are not captured (experts in float32, say, whose products torch makes on the host's word).
    """
    with tempfile.TemporaryDirectory(prefix="stemline-model-") as folder:
        try:
            model = build(model_type, Path(folder))
            expected = [_generate(model, prompt) for prompt in prompts()]
        except Exception as error:  # configs and models raise many kinds
            return Checked(model_type, "untested", first_line(error))
        return _compare(model_type, folder, expected, device)


def build(model_type: str, folder: Path) -> Any:
    """A tiny random float32 model, saved in `folder`. Raises ValueError for one that is not tiny."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = tiny_config(*model_type.split("/"))
    autos: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping or auto is autos[-1])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"no tiny model could be made: {parameters:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation=None).eval()
    randomize(model)
    stops = model.generation_config
    stops.bos_token_id, stops.eos_token_id, stops.pad_token_id = 1, 2, 0
    model.save_pretrained(folder)
    return model


def prompts() -> list[np.ndarray]:
    """Random token ids, special ones left out."""
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCABULARY // 2, size=length) for length in LENGTHS]


def _generate(model: Any, prompt: np.ndarray) -> list[int]:
    ids = torch.as_tensor(prompt)[None]
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def _compare(model_type: str, folder: str, expected: list[list[int]], device: str) -> Checked:
    config = EngineConfig(
        folder, device=device, precision="fp32", chunk_tokens=CHUNK, max_live=4, max_context=1024, attention=None
    )
    try:
        engine = Engine(config)
    except EngineError as error:
        return Checked(model_type, "refused", str(error).replace(folder, model_type))
    runner, found = engine._runner, {}
    for name, attention in (("dense", None), ("sparse", SPARSE)):
        try:
            if attention is not None:
                engine = Engine(replace(config, attention=attention), runner)
            found[name] = _run(engine)
        except EngineError as error:
            return Checked(model_type, "refused", str(error).replace(folder, model_type))
        failed = next((each for each in found[name] if each.status != "ok"), None)
        if failed is not None:
            return Checked(model_type, "wrong", f"{name}: {failed.error}")
        if name == "dense" and [each.token_ids for each in found[name]] != expected:
            return Checked(model_type, "wrong", f"{name}: other tokens than transformers'")
    longest = found["sparse"][0]
    budgets = [policy.budget(LENGTHS[0], window).budgets for policy, window in runner.layers]
    sparse = f"{sum(budget is not None for budget in budgets)} of {len(budgets)} layers"
    if longest.attention == "stem" and (longest.density or 1.0) >= 1.0:
        return Checked(model_type, "wrong", "sparse: nothing was left out")
    status = "stem" if longest.attention == "stem" else "dense"
    mode = "" if device == "cpu" else f"; decode: {engine.describe()['decode']}"
    return Checked(model_type, status, (longest.attention_reason or "") + mode, sparse, _fp8(runner))


def _fp8(runner: ModelRunner) -> str:
    if runner.sources or any(shape.head_dim != shape.value_dim for shape in runner.shapes.values()):
        return "no"
    return "not its experts" if stay_wide(runner.model) else "yes"


def stay_wide(model: nn.Module) -> bool:
    """Whether stacked weights of a model stay as they are in --precision fp8; those of convolutions do not count."""
    taken = {
        id(weight)
        for experts in find_experts(model).values()
        if not experts_obstacle(experts)
        for weight in experts.parameters()
    }
    return any(
        parameter.ndim == 3 and id(parameter) not in taken
        for module in model.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )


def _run(engine: Engine) -> list[Completion]:
    done: dict[str, Completion] = {}
    for number, prompt in enumerate(prompts()):
        engine.add(Request(str(number), prompt, NEW_TOKENS))
    while engine.has_work:
        done |= {each.request_id: each for each in engine.step()}
    return [done[str(number)] for number in range(len(LENGTHS))]
