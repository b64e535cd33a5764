"""patch_model on every family: equal to the model's own attention when nothing is dropped, or refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernels.block_selection import BlockSelection
from stem_core import DecodeContext, PrefillContext, StemConfig, patch_model, unpatch_model
from stem_core.attention import attention_forward
from stem_core.patch import UnsupportedModelError
from stem_core.selection import stem_selection

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SUPPORTED = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 40},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": None},
    "gemma": {},
    "gemma3_text": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2},
    "glm": {},
    "starcoder2": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40},
}
REFUSED = {
    "gemma2": ({"sliding_window": 40}, "soft-capping"),
    "deepseek_v3": (
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 3,
        },
        "latent attention",
    ),
}


def tiny(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=3.0)  # some heads keep most for their sink, some nothing
    return model


def prompt(length=200, batch=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


SPARSE = StemConfig(
    schedule="density", density=0.3, block_size=16, dense_layers=0, dense_below=0, sink_blocks=1, local_blocks=2
)


@pytest.fixture
def everything(monkeypatch):
    """Scores, selection and the sparse kernel run; then every causal block is put where the selection was. Holds how
    many blocks each selection had dropped."""
    dropped = []

    def keep_all(q, *args, start=0, **kwargs):
        kept = stem_selection(q, *args, start=start, **kwargs)
        rows = torch.arange(kept.counts.shape[2]) + start // SPARSE.block_size
        counts = (rows + 1).to(torch.int32).expand(kept.counts.shape).contiguous()
        blocks = torch.arange(int(counts.max()), dtype=torch.int32).expand(*counts.shape, -1).contiguous()
        dropped.append(int((counts - kept.counts).sum()))
        return BlockSelection(blocks, counts)

    monkeypatch.setattr("stem_core.attention.stem_selection", keep_all)
    return dropped


@pytest.mark.parametrize("config", [None, SPARSE], ids=["dense", "everything"])
@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_supported_families_equal_their_own_attention(family, config, everything):
    model = tiny(family, **SUPPORTED[family])
    ids = prompt()
    own = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    patch_model(model, config)
    torch.testing.assert_close(model(ids).logits, own, atol=2e-4, rtol=2e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    # Every layer of this Mistral has a window that cuts the prompt.
    assert (sum(everything) > 0) == (config is not None and family != "mistral"), "the selections had dropped nothing"
    unpatch_model(model)
    torch.testing.assert_close(model(ids).logits, own)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3_text"])
@torch.no_grad()
def test_a_small_budget_really_drops_blocks(family):
    model = tiny(family, **SUPPORTED[family])
    ids = prompt(600)
    own = model(ids).logits
    patch_model(model, SPARSE)
    # float noise is 1e-5 here; a dropped block shows far above it
    assert (model(ids).logits - own).abs().max() > 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_features_are_refused_by_name(family):
    changes, feature = REFUSED[family]
    with pytest.raises(UnsupportedModelError, match=feature):
        patch_model(tiny(family, **changes), StemConfig())


def test_a_model_without_attention_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="no attention layers"):
        patch_model(torch.nn.Linear(4, 4), StemConfig())


def test_attention_without_patch_says_so():
    model = patch_model(tiny("llama"), None)
    del model.model.layers[1].self_attn.stem_policy
    with pytest.raises(RuntimeError, match=r"call stem_core\.patch_model"):
        model(prompt())


OFF = {"position_bias": None, "indices": None, "s_aux": None, "softcap": None, "use_sinks": False}
PASSED = {
    "position_ids": torch.arange(4)[None],
    "use_cache": True,
    "is_causal": True,
    "cache_position": torch.arange(4),
}
CHANGES = {
    "s_aux": torch.zeros(2),  # of the KV heads
    "softcap": 30.0,
    "sinks": torch.zeros(4),
    "position_bias": torch.zeros(1, 4, 4, 4),
    "indices": torch.zeros(1, 4, 2, dtype=torch.int64),
    "block_indices": torch.zeros(1, 4, 2, dtype=torch.int64),
    "cu_seq_lens_q": torch.tensor([0, 2, 4]),
    "max_length_q": 2,
    "head_mask": torch.ones(4),
    "is_causal": False,
    "chunk_size": 2,
    "a_feature_of_tomorrow": True,
}


@pytest.mark.parametrize("context", [None, PrefillContext(prompt_length=4)])
@pytest.mark.parametrize("name", CHANGES)
def test_arguments_that_change_the_computation_are_refused(name, context):
    module = patch_model(tiny("llama"), None).model.layers[1].self_attn
    q, k = torch.zeros(1, 4, 4, 16), torch.zeros(1, 2, 4, 16)
    known = OFF | PASSED
    attention_forward(module, q, k, k, None, stem_context=context, **known)
    feature = {"s_aux": "attention sinks", "softcap": "soft-capping"}.get(name, f"its attention for {name}=")
    with pytest.raises(ValueError, match=feature):
        attention_forward(module, q, k, k, None, stem_context=context, **(known | {name: CHANGES[name]}))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(family, side):
    model = patch_model(tiny(family, **SUPPORTED[family]), SPARSE.replace(density=0.4))
    ids = prompt(330, batch=2)
    length = 250
    alone = model(ids[1:, :length]).logits[0]
    part = slice(330 - length, 330) if side == "left" else slice(0, length)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, part] = 1
    padded = ids.clone()
    padded[1] = 0
    padded[1, part] = ids[1, :length]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together[1, part], alone, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(together[0], model(ids[:1]).logits[0], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_row_of_padding_alone_costs_its_neighbours_nothing():
    model = patch_model(tiny("llama"), None)
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    together = model(ids, attention_mask=mask, position_ids=torch.arange(40).expand(2, -1)).logits
    torch.testing.assert_close(together[0], model(ids[:1]).logits[0], atol=2e-4, rtol=2e-4)
    assert together.isfinite().all()


def test_masks_that_are_not_padding_are_refused():
    model = patch_model(tiny("llama"), None)
    holes = torch.ones(1, 200, dtype=torch.long)
    holes[0, 50:60] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        model(prompt(), attention_mask=holes)
    packed = torch.cat((torch.arange(100), torch.arange(100)))[None]
    with pytest.raises(ValueError, match="packed sequences"):
        model(prompt(), position_ids=packed, use_cache=False)


class Arena:
    """The least that a transformers decoder asks of a cache: one document's keys and values, written in place."""

    is_compileable = False

    def __init__(self, layers: int, tokens: int):
        self.keys = torch.full((layers, 1, 2, tokens, 16), torch.nan)
        self.values = torch.full((layers, 1, 2, tokens, 16), torch.nan)
        self.start = 0

    def update(self, k, v, layer, *args, **kwargs):
        rows = slice(self.start, self.start + k.shape[2])
        self.keys[layer, :, :, rows], self.values[layer, :, :, rows] = k, v
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer=0):
        return self.start

    def get_query_offset(self, layer=0):
        return self.start

    def get_mask_sizes(self, q_length, layer=0):
        return self.start + q_length, 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("preset", ["release", "sampled", None])
@torch.no_grad()
def test_chunks_with_a_context_equal_the_whole_prompt(family, preset):
    small = {"block_size": 16, "sink_blocks": 1, "local_blocks": 2, "dense_below": 0}
    if preset == "sampled":
        small |= {"schedule": "density", "density": 0.3, "dense_tail": 2}
    config = preset and StemConfig.preset(preset, **small)
    model = patch_model(tiny(family, **SUPPORTED[family]), config)
    ids = prompt(1001)
    whole = model(ids, logits_to_keep=1).logits
    for step in (16, 112, 1008) if config else (16, 100, 1001):
        cache, context = Arena(3, 1100), PrefillContext(prompt_length=1001)
        for start in range(0, 1001, step):
            cache.start = context.start = start
            positions = torch.arange(start, min(1001, start + step))[None]
            logits = model(
                ids[:, start : start + step],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                stem_context=context,
            ).logits
        torch.testing.assert_close(logits, whole, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_decode_context_attends_to_each_documents_extent():
    model = patch_model(tiny("llama"), None)
    arena = Arena(3, 400)
    ids = prompt(150)
    arena.keys[:, :, :, 100:249], arena.values[:, :, :, 100:249] = _keys_of(model, ids[:, :149])
    arena.start = 249
    context = DecodeContext(torch.tensor([100]), torch.tensor([150], dtype=torch.int32), max_length=400)
    logits = model(
        ids[:, 149:], position_ids=torch.tensor([[149]]), past_key_values=arena, use_cache=True, stem_context=context
    ).logits
    torch.testing.assert_close(logits, model(ids, logits_to_keep=1).logits, atol=2e-4, rtol=2e-4)


def _keys_of(model, ids):
    cache = Arena(3, ids.shape[1])
    model(ids, past_key_values=cache, use_cache=True, stem_context=PrefillContext(prompt_length=ids.shape[1]))
    return cache.keys, cache.values
