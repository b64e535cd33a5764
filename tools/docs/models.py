"""docs/models.md: which models run, from what python -m tools.models found."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from tools.docs.markdown import table
from tools.models.__main__ import read_results
from tools.models.check import Checked

_GEMMA_4 = (
    "text only; E2B and E4B, as the tiny model here, share keys and values between layers, which fp8 does not take; in "
    "31B and 26B-A4B it leaves the attention of global layers (heads of 512) in 16 bits"
)
# Names that people know, the types in their checkpoints' config.json, and what is to be said of the real ones.
FAMILIES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Llama 2, 3.x", ("llama",), ""),
    ("Llama 4", ("llama4", "llama4_text"), ""),
    ("Qwen 2, 2.5", ("qwen2", "qwen2_moe"), ""),
    ("Qwen 3", ("qwen3", "qwen3_moe"), ""),
    ("Qwen 3 VL, Qwen 2.5 VL", ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"), "text only"),
    ("Qwen 3.5, Qwen 3 Next", ("qwen3_5", "qwen3_5_moe", "qwen3_next"), ""),
    ("Gemma 3", ("gemma3", "gemma3_text"), "text only"),
    ("Gemma 3n", ("gemma3n", "gemma3n_text"), "text only"),
    ("Gemma 4", ("gemma4", "gemma4_text"), _GEMMA_4),
    ("Mistral 7B, Mixtral", ("mistral", "mixtral"), ""),
    ("Mistral Small 3.x", ("mistral3",), "text only"),
    ("Ministral 3", ("mistral3/ministral3", "ministral3"), "text only"),
    ("gpt-oss", ("gpt_oss",), ""),
    ("Phi 3, Phi 4", ("phi3",), ""),
    ("GLM 4, 4.5", ("glm4", "glm4_moe"), ""),
    ("GLM 4V", ("glm4v", "glm4v_moe"), "text only"),
    ("Granite 3, 4", ("granite", "granitemoe", "granitemoehybrid"), ""),
    ("OLMo 2, 3", ("olmo2", "olmo3"), ""),
    ("Command R, A", ("cohere", "cohere2"), ""),
    ("SmolLM 2, 3", ("llama", "smollm3"), ""),
    ("EXAONE 4", ("exaone4",), ""),
    ("Nemotron H, 3", ("nemotron_h",), ""),
    ("DeepSeek V3, R1; Kimi K2", ("deepseek_v3",), ""),
)
TEXT_MODELS = ("ministral3",)
STATUS = {"stem": "Stem", "dense": "dense only", "refused": "refused", "untested": "not tested", "wrong": "**wrong**"}


def models_page() -> str:
    """The text of docs/models.md."""
    version, found = read_results()
    by_type = {each.model_type: each for each in found}
    runs = [each for each in found if each.status in ("stem", "dense")]
    families = table(
        ("model", "model type", "status", "sparse", "`--precision fp8`", "note"),
        [
            (name, f"`{each.model_type}`", STATUS[each.status], each.sparse, each.fp8, _note(each, note))
            for name, types, note in FAMILIES
            for each in (by_type[each] for each in types if each in by_type)
        ],
    )
    rows = [(f"`{each.model_type}`", STATUS[each.status], each.sparse, each.fp8) for each in runs]
    parts = [
        _INTRO.format(version=version, count=len(runs), sparse=sum(each.status == "stem" for each in runs)),
        "## Models by name\n", families,
        "\n## All types that run\n", table(("model type", "status", "sparse", "`--precision fp8`"), rows),
        _REFUSED, table(("reason", "model types"), _by_reason(each for each in found if each.status == "refused")),
        _UNTESTED, ", ".join(f"`{each.model_type}`" for each in found if each.status == "untested") + ".",
        _CHECKPOINTS,
    ]  # fmt: skip
    wrong = [each for each in found if each.status == "wrong"]
    if wrong:
        parts[-1:-1] = ["\n## Wrong\n", table(("model type", "what"), [(f"`{e.model_type}`", e.reason) for e in wrong])]
    return "\n".join(parts)


def _note(each: Checked, note: str) -> str:
    """Why it is refused, or what is to be said of it; "text only" says nothing of a text model."""
    if each.status == "refused":
        return _short(each)
    is_text = each.model_type.endswith("_text") or each.model_type in TEXT_MODELS
    return note.removeprefix("text only").removeprefix("; ") if is_text else note


def _by_reason(refused: Iterable[Checked]) -> list[tuple[str, str]]:
    types = defaultdict(list)
    for each in refused:
        types[_short(each)].append(f"`{each.model_type}`")
    return [(reason, ", ".join(names)) for reason, names in sorted(types.items(), key=lambda item: -len(item[1]))]


def _short(each: Checked) -> str:
    """A refusal without the names of the model and of its class, and without layers' numbers."""
    if each.status != "refused":
        return ""
    text = re.sub(r"^(cannot load )?model '[^']+'( cannot run here)?: ", "", each.reason)
    text = re.sub(r"^\w+(?: \(model type [^)]+\))? (?=computes|uses|has|does|keeps|gives|cannot)", "", text)
    text = re.sub(r"(layers?)? ?\d+(, \d+)+(, \.\.\.)?", r"\1", text)
    return text.split("; use another model")[0].split(": use another model")[0].strip()


_INTRO = """\
# Which models

Stemline runs models of transformers by their `model_type` (in `config.json`). {count} types run, {sparse} of them with
Stem sparse prefill.

This page is written by `python -m tools.docs` from what `python -m tools.models` found with transformers {version};
do not edit it by hand. For each type that transformers knows, the tool makes a tiny random model with all parts of the
real one (windows, experts, shared layers). It reads prompts of several chunks and decodes them in one batch, in float32
on a CPU. Densely, that must give the tokens of transformers' own `generate`; sparsely, all documents must end, with
blocks left out. So the page says that a model's code runs right, not how well its answers are
with sparse prefill: [Checks](checks.md) is about that.

- **Stem**: full attention layers are sparse. Layers with a sliding window keep to it.
- **dense only**: every layer has a window, so that nothing is left to make sparse.
- **refused**: loading ends with the reason; nothing runs.
- **sparse**: of the tiny model's attention layers. Layers that read the prompt's last token alone are not counted.
- **text only**: the model also reads images or sounds. Its language model is loaded, its encoders are not. Documents
  cannot hold an image: what looks like its token in a text is text, and a prompt with the token itself is refused.
"""
_REFUSED = """
## Refused

For multi-head latent attention (DeepSeek, Kimi) and for chunked attention (Llama 4) use a model with grouped-query
attention of the same size: Qwen3 or GLM 4.5, say.
"""
_UNTESTED = """
## Not tested

Of these no tiny model could be made, or transformers itself could not run it here. When such a model is loaded, two
short documents are read alone and together, and it is refused if the logits differ.
"""
_CHECKPOINTS = """
## Checkpoints

All types are read from safetensors in bf16, fp16 or fp32. `--precision fp8` quantises linears and experts as they are
loaded, but for linears that make keys or values alone, and the last layer's. "Not its experts" means that those of a
mixture stay in 16 bits, where transformers' interface for experts does not know them, or norms stand between them. That
column follows from the model's structure; the tool runs float32 alone. What other formats are read, and what is refused
with which advice, is in [Troubleshooting](troubleshooting.md).
"""
