"""jobs.evaluate: the ideas beyond Stem, which stand behind an arm's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluate.__main__ import main
from jobs.evaluate.arms import Arm, Place, make_arms
from jobs.evaluate.attention import Chunk, evaluation_attention
from jobs.evaluate.beyond import mean_corrected
from jobs.evaluate.engine_reader import engine_arms
from jobs.evaluate.results import read_rows
from jobs.evaluate.scores import product_scores
from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention import block_sparse_attention
from pipeline.errors import JobError

MODEL = str(Path(__file__).parents[2] / "models/tiny-reader")
TOKENS = 333  # 21 blocks, the last of 13 tokens


def arm(spec: str, density: float = 0.6, tail: int = 0) -> Arm:
    return make_arms([spec], [16], [density], [tail], dense_layers=0)[0]


def qkv(seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [scale * torch.randn(1, heads, TOKENS, 32) for heads in (4, 2, 2)]


def attend(chosen: Arm, q: Tensor, k: Tensor, v: Tensor, start: int = 0, end: int = TOKENS) -> Tensor:
    """[N, H, end - start, D]."""
    layer = nn.Module()
    layer.layer_idx = 1  # type: ignore[assignment]
    chunk = Chunk(chosen, TOKENS, start)
    out, _ = evaluation_attention(layer, q[:, :, start:end], k[:, :, :end], v[:, :, :end], None, evaluation=chunk)
    return out.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_corrected_attention_is_dense_where_a_blocks_keys_are_the_same() -> None:
    q, k, v = qkv()
    same = k[:, :, ::16].repeat_interleave(16, 2)[:, :, :TOKENS]
    assert (attend(arm("stem"), q, same, v) - dense(q, same, v)).abs().max() > 0.1
    torch.testing.assert_close(attend(arm("stem+mean"), q, same, v), dense(q, same, v))


def test_corrected_attention_is_dense_where_everything_is_kept() -> None:
    q, k, v = qkv()
    counts = torch.arange(1, 22, dtype=torch.int32).expand(1, 4, -1)
    everything = BlockSelection(torch.arange(21, dtype=torch.int32).expand(1, 4, 21, -1), counts)
    out, lse = block_sparse_attention(q, k, v, everything, block_size=16, return_lse=True)
    found = mean_corrected(out, lse, q, k, v, everything, Place(1, 0, TOKENS, None), 16)  # type: ignore[arg-type]
    torch.testing.assert_close(found, dense(q, k, v))


def test_corrected_attention_by_its_formula() -> None:
    q, k, v = qkv()
    chosen = arm("sample+mean", tail=2)
    selection = chosen.select(q, k, v, Place(1, 0, TOKENS, None))
    assert selection is not None
    kept = selection.to_mask(21).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :TOKENS, :TOKENS]
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = (q @ keys.mT * 32**-0.5).masked_fill(~(kept & torch.ones(TOKENS, TOKENS).tril().bool()), -torch.inf)
    means = [x[:, :, : 20 * 16].unflatten(2, (20, 16)).mean(3) for x in (keys, values)]
    dropped = ~kept[..., : 20 * 16 : 16] & (torch.arange(20) < torch.arange(TOKENS)[:, None] // 16)
    assert dropped.any()
    more = (q @ means[0].mT * 32**-0.5 + torch.tensor(16.0).log()).masked_fill(~dropped, -torch.inf)
    expected = torch.cat([logits, more], -1).softmax(-1) @ torch.cat([values, means[1]], 2)
    torch.testing.assert_close(attend(chosen, q, k, v), expected)


def test_corrected_attention_does_not_depend_on_chunks_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    chosen = arm("sample+mean")
    whole = attend(chosen, q, k, v)
    monkeypatch.setattr("jobs.evaluate.beyond.MASS_ENTRIES", 4 * 16 * 21 * 2)
    parts = [attend(chosen, q, k, v, start, end) for start, end in ((0, 16), (16, 160), (160, TOKENS))]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("spec", ["sample+adaptive", "oracle+adaptive", "sample+threshold", "sample+heads"])
def test_adaptive_rows_share_a_budget(spec: str) -> None:
    """Exactly as many blocks as without; by shares a narrow head keeps less than a wide one, by a threshold more."""
    q, k, v = qkv()
    q[:, 0] *= 8  # narrow
    q[:, 1] *= 0.1
    chosen, place = arm(spec, density=0.85, tail=2), Place(1, 0, TOKENS, None)
    selection = chosen.select(q, k, v, place)
    uniform = arm("oracle", density=0.85, tail=2).select(q, k, v, place)
    assert selection is not None
    assert uniform is not None
    assert selection.counts.sum() == uniform.counts.sum()
    assert selection.density() == pytest.approx(chosen.density(TOKENS, 8)[0])
    assert uniform.counts[0, 0].sum() == uniform.counts[0, 1].sum()
    narrow, wide = selection.counts[0, 0].sum(), selection.counts[0, 1].sum()
    assert abs(narrow - wide) > 10
    assert (narrow < wide) == ("adaptive" in spec)
    mask = selection.to_mask(21)
    assert torch.equal(mask[:, :, -2:], uniform.to_mask(21)[:, :, -2:])  # the tail keeps all
    assert not mask.triu(1).any()
    assert mask[..., :4].tril().sum() == 4 * (21 * 4 - 6)  # sink
    indices, counts = selection.indices, selection.counts.long()
    assert torch.equal(indices.gather(-1, counts[..., None] - 1)[..., 0], torch.arange(21).int().expand(1, 4, -1))


def test_adaptive_keeps_the_same_estimated_share_everywhere() -> None:
    """What a row keeps has at least the share p of its scores, and without its last free block less than p."""
    q, k, v = qkv(scale=1.5)
    chosen, place = arm("sample+adaptive", density=0.8), Place(1, 0, TOKENS, None)
    selection = chosen.select(q, k, v, place)
    assert selection is not None
    assert chosen.config is not None
    scores = product_scores(q, k, v, place, chosen.config).masked_fill(~torch.ones(21, 21).tril().bool(), 0.0)
    share = scores / scores.sum(-1, keepdim=True)
    mask = selection.to_mask(21)
    i, j = torch.arange(21)[:, None], torch.arange(21)
    free = (j <= i) & (j >= 4) & (j <= i - 4)
    got = (share * mask).sum(-1)
    least_free = share.masked_fill(~(mask & free), torch.inf).amin(-1)
    open_rows = (~mask & free).any(-1)
    some_free = (mask & free).any(-1)
    assert open_rows.any()
    assert some_free.any()
    p = (got - least_free)[some_free].max()  # each row had less than p before its last block
    assert (got[open_rows] >= p - 1e-6).all()
    dropped = share.masked_fill(mask | ~free, 0.0).amax(-1)
    assert (dropped[some_free] <= least_free[some_free]).all()


def test_a_threshold_is_the_same_everywhere() -> None:
    q, k, v = qkv(scale=1.5)
    chosen, place = arm("sample+threshold", density=0.8), Place(1, 0, TOKENS, None)
    selection = chosen.select(q, k, v, place)
    assert selection is not None
    assert chosen.config is not None
    scores, mask = product_scores(q, k, v, place, chosen.config), selection.to_mask(21)
    i, j = torch.arange(21)[:, None], torch.arange(21)
    free = (j >= 4) & (j <= i - 4)
    assert scores[mask & free].min() >= scores[~mask & free].max()


def test_heads_share_the_blocks_of_a_row() -> None:
    """Each row keeps as many blocks as without, over all heads, the highest scores; however the prompt is cut."""
    q, k, v = qkv(scale=1.5)
    chosen, place = arm("sample+heads", density=0.8), Place(1, 0, TOKENS, None)
    selection, uniform = (item.select(q, k, v, place) for item in (chosen, arm("oracle", density=0.8)))
    assert selection is not None
    assert uniform is not None
    assert torch.equal(selection.counts.sum(1), uniform.counts.sum(1))
    assert not torch.equal(selection.counts, uniform.counts)
    assert chosen.config is not None
    scores, mask = product_scores(q, k, v, place, chosen.config), selection.to_mask(21)
    i, j = torch.arange(21)[:, None], torch.arange(21)
    free = (j >= 4) & (j <= i - 4)
    kept = scores.masked_fill(~(mask & free), torch.inf).amin((1, 3))
    assert (kept >= scores.masked_fill(mask | ~free, -torch.inf).amax((1, 3))).all()
    whole = attend(chosen, q, k, v)
    parts = [attend(chosen, q, k, v, start, end) for start, end in ((0, 16), (16, 160), (160, TOKENS))]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_ideas_in_specs() -> None:
    arms = make_arms(["sampled+adaptive+mean", "stem+mean:dense_tail=1", "stem"], [16], [0.5], [0], 0)
    assert [(item.mean, item.shared_budget) for item in arms] == [(True, "adaptive"), (True, ""), (False, "")]
    assert [item.name for item in arms] == ["sampled+adaptive+mean", "stem+mean:dense_tail=1", "stem"]
    assert arms[1].config == arms[2].config.replace(dense_tail=1)  # type: ignore[union-attr]
    with pytest.raises(JobError, match="did you mean 'mean'"):
        make_arms(["stem+means"], [16], [0.5], [0], 0)
    with pytest.raises(JobError, match="adaptive needs scores that are shares of attention"):
        make_arms(["stem+adaptive"], [16], [0.5], [0], 0)
    with pytest.raises(JobError, match="of adaptive, threshold, heads an arm takes one"):
        make_arms(["sample+adaptive+threshold"], [16], [0.5], [0], 0)
    with pytest.raises(JobError, match="cannot run arm 'stem\\+mean:dense_tail=1'"):
        engine_arms(arms[1:2], ["fp32"])


def test_job_with_ideas(tmp_path: Path) -> None:
    common = ["--model", MODEL, "--device", "cpu", "--lengths", "600", "--questions", "1", "--no-plots"]
    common += ["--tasks", "report_facts", "--densities", "0.4", "--output", str(tmp_path)]
    assert main([*common, "--arms", "dense", "stem", "stem+mean", "sample+adaptive+mean"]) == 0
    rows = {row["arm"]: row for row in read_rows([tmp_path])}
    assert list(rows) == ["dense", "stem", "stem+mean", "sample+adaptive+mean"]
    assert rows["stem"]["density"] == rows["stem+mean"]["density"]
    assert rows["sample+adaptive+mean"]["density"] == pytest.approx(0.4, abs=0.01)
    assert 0 < rows["stem+mean"]["first_token_kl"] < rows["stem"]["first_token_kl"]
