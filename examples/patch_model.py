"""Sparse prefill in plain transformers, without the pipeline: python examples/patch_model.py"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from stem_core import StemConfig, patch_model

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "examples/documents/newton-opticks-planted.txt").read_text(encoding="utf-8")

model = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-reader").eval()
tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-reader")
patch_model(model, StemConfig.preset("sampled", schedule="density", density=0.3, block_size=16, dense_layers=0))
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": f"{TEXT}\n\nList the key findings in order."}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)  # fmt: skip
output = model.generate(**prompt, max_new_tokens=200, do_sample=False)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
