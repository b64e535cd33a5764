"""Do engine and generate write the same tokens? Asked before anything is timed.

Greedy, dense attention, the bundled trained model. In low precision two right computations part where two tokens are
almost equally likely; there the gap between their logits says whether it was a tie.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from jobs.measurement import TIE
from pipeline.engine import Engine, EngineConfig, Request, SharedPrompt
from pipeline.engine.devices import release_memory
from pipeline.engine.model.loading import load_model
from tools.demo_documents.reports import synthetic_report

MODEL = Path(__file__).parents[3] / "models" / "tiny-reader"
QUESTION = "List all key findings of the report in the order in which they appear."


@dataclass(frozen=True)
class Parting:
    """Where the two outputs of a document part.

    gap: logit of generate's token less that of the engine's, by the model's own attention on the common text; tie:
    whether it is within the precision's noise.
    """

    document: int
    token: int
    gap: float
    tie: bool


# Of a prompt that is asked twice behind a shared prefix: what is left for the requests.
TAIL = 20


def check_agreement(
    device: str, precision: str, document_tokens: list[int], new_tokens: int, shared: bool = False
) -> dict[str, Any]:
    """Identical tokens before the first difference, over all tokens, and each parting. "ok": every parting is a tie.

    shared: the engine gets all but the last TAIL tokens of each prompt as a prefix that two requests share.
    """
    prompts = report_prompts(document_tokens)
    config = EngineConfig(
        str(MODEL),
        device=device,
        precision=precision,
        chunk_tokens=2048,
        max_live=(1 + shared) * len(prompts),
        arena_tokens=2 * sum(document_tokens) + 4096,
    )
    engine = Engine(config)
    for i, prompt in enumerate(prompts):
        if shared:
            asked = tuple(Request(f"{i} {time}", prompt[-TAIL:], new_tokens) for time in ("first", "again"))
            engine.add_shared(SharedPrompt(prompt[:-TAIL], asked))
        else:
            engine.add(Request(str(i), prompt, new_tokens))
    outputs: list[tuple[int, list[int]]] = []
    while engine.has_work:
        for done in engine.step():
            if done.status != "ok":
                return {"ok": False, "precision": precision, "error": done.error}
            outputs.append((int(done.request_id.split()[0]), done.token_ids))
    about = engine.describe()
    engine.close()

    model: Any = load_model(config)
    model.set_attn_implementation("sdpa")
    same = total = 0
    partings: list[Parting] = []
    generated = [_generate(model, prompt, new_tokens, config.torch_device()) for prompt in prompts]
    for i, output in sorted(outputs):
        prompt, expected = prompts[i], generated[i]
        common = _common(output, expected)
        same, total = same + common, total + len(expected)
        if output != expected:
            gap = _gap(model, [*prompt, *expected[:common]], output, expected, common, config.torch_device())
            partings.append(Parting(i, common, gap, abs(gap) <= TIE[precision]))
    del model
    release_memory(config.torch_device())
    return {
        "ok": all(parting.tie for parting in partings),
        "model": MODEL.name,
        "precision": precision,
        "documents": len(prompts),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "identical_share": same / total,
        "tokens": total,
        "partings": [asdict(parting) for parting in partings],
        "kernels": about["kernels"],
        "decode": about["decode"],
    }


def report_prompts(document_tokens: list[int]) -> list[np.ndarray]:
    """Chat prompts over synthetic reports of about these lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rng = Random(0)
    prompts = []
    for n_tokens in document_tokens:
        report = synthetic_report(rng, "Report", n_tokens, 4, 2, lambda text: len(tokenizer.encode(text)))
        message = [{"role": "user", "content": f"{report.text}\n\n{QUESTION}"}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        prompts.append(np.asarray(ids, dtype=np.int64))
    return prompts


def _generate(model: Any, prompt: np.ndarray, new_tokens: int, device: torch.device) -> list[int]:
    ids = torch.as_tensor(prompt, device=device)[None]
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


def _common(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _gap(model: Any, text: list[int], ours: list[int], theirs: list[int], at: int, device: torch.device) -> float:
    if at >= min(len(ours), len(theirs)):
        return float("inf")  # one output is longer: a stop was missed, which is no tie
    with torch.inference_mode():
        logits = model(torch.as_tensor(text, device=device)[None], logits_to_keep=1).logits[0, -1].float()
    return float(logits[theirs[at]] - logits[ours[at]])
