"""What the attention benchmark times: dense baselines, FlexAttention and our kernels on the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.block_selection import BlockSelection, select_blocks
from kernels.block_sparse_attention import block_sparse_attention, choose_block_sparse_attention
from kernels.fp8_heads import fp8_obstacle
from stem_core.budget import prompt_budget
from stem_core.config import StemConfig
from stem_core.selection import stem_selection
from tools.benchmark._attention_check import BLOCK
from tools.benchmark._attention_fp8 import Fp8Layer

Prepared = tuple[Callable[[], object], BlockSelection | None]


@dataclass
class Case:
    """A name, and what makes its call ready: (call, selection or None for dense). The call returns [1, H, L, D].

    `prepare` runs inside the case, so that a baseline that is missing or refuses costs its own row only."""

    name: str
    prepare: Callable[[], Prepared]
    note: str = ""
    attends: bool = True  # False: no attention flops and no output
    fp8: Fp8Layer | None = None  # its error is allowed, not that of eager bfloat16


def table_cases(q: Tensor, k: Tensor, v: Tensor, densities: list[float], flex: bool) -> Iterator[Case]:
    """Every case at one length; q [1, H, L, D], k and v [1, Hkv, L, D]. flex: FlexAttention among them."""
    best = choose_block_sparse_attention(q, BLOCK, k=k, v=v)
    impls = ("gluon", "triton") if best.impl == "gluon" else (best.impl,)
    fp8 = None if fp8_obstacle(q.device) else Fp8Layer(q, k, v)
    fp8_impls, fp8_note = fp8.impls() if fp8 else ((), "")

    @cache
    def blocks(density: float) -> BlockSelection:
        return random_selection(q, density)

    def ours(density: float | None, impl: str) -> Prepared:
        selection = None if density is None else blocks(density)
        return partial(block_sparse_attention, q, k, v, selection, impl=impl), selection  # type: ignore[arg-type]

    def ours_fp8(density: float | None, impl: str) -> Prepared:
        assert fp8
        return fp8.case(None if density is None else blocks(density), impl)

    def stem_fp8(config: StemConfig) -> Prepared:
        assert fp8
        return fp8.stem(stem_select(q, k, v, config))

    def same_blocks_by_flex(density: float) -> Prepared:
        return flex_attention(q, k, v, blocks(density))

    yield Case("dense cuDNN", partial(sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION))
    yield Case("dense FlashAttention-2", partial(sdpa, q, k, v, SDPBackend.FLASH_ATTENTION))
    for impl in impls:
        yield Case(f"dense ours {impl}", partial(ours, None, impl), note=best.reason)
    if fp8:
        yield Case("fp8 preparation alone", lambda: (fp8.prepare, None), attends=False)
    for impl in fp8_impls:
        yield Case(f"dense fp8 {impl}", partial(ours_fp8, None, impl), note=fp8_note, fp8=fp8)
    yield Case("selection alone (OAM)", lambda: (stem_select(q, k, v, at_density(densities[0])), None), attends=False)
    for density in densities:
        for impl in impls:
            yield Case(f"{density:.0%} ours {impl}", partial(ours, density, impl))
        for impl in fp8_impls:
            yield Case(f"{density:.0%} fp8 {impl}", partial(ours_fp8, density, impl), fp8=fp8)
        if flex:
            yield Case(f"{density:.0%} FlexAttention", partial(same_blocks_by_flex, density))
        config = at_density(density)
        yield Case(f"{density:.0%} Stem, selection included", partial(stem, q, k, v, config))
        if fp8:
            name = f"{density:.0%} Stem fp8, selection and preparation included"
            yield Case(name, partial(stem_fp8, config), fp8=fp8)
    for name in ("sampled", "release"):
        config = StemConfig.preset(name)
        yield Case(f"{name} preset, selection included", partial(stem, q, k, v, config))


def crossover_cases(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    """The dense paths and Stem at its default schedule: from which length on Stem pays."""
    yield Case("dense cuDNN", partial(sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION))
    yield Case("dense ours", lambda: (partial(block_sparse_attention, q, k, v, None), None))
    yield Case("Stem", partial(stem, q, k, v, StemConfig()))


def at_density(density: float) -> StemConfig:
    return StemConfig(schedule="density", density=density)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Prepared:
    """Dense causal attention by one of torch's backends; K and V repeated beforehand where it has no GQA."""

    def call(key: Tensor = k, value: Tensor = v) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=key is k)

    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        group = q.shape[1] // k.shape[1]
        return partial(call, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)), None
    return call, None


def stem_select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> Callable[[], BlockSelection]:
    """The product's own selection; the budgets depend on the length alone and are ready beforehand.

    Raises ValueError where the schedule keeps every block: there is nothing to select then."""
    budget = prompt_budget(q.shape[2], config)
    if budget.budgets is None:
        raise ValueError(budget.reason)
    return lambda: stem_selection(q, k, v, config, budget)


def stem(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> Prepared:
    """The product's path: scores, selection and attention in one call; dense where the schedule keeps every block."""
    if prompt_budget(q.shape[2], config).budgets is None:
        return partial(block_sparse_attention, q, k, v, None), None
    select = stem_select(q, k, v, config)
    return lambda: block_sparse_attention(q, k, v, select()), select()


def random_selection(q: Tensor, density: float) -> BlockSelection:
    """Random blocks up to `density` of each row's causal ones, at least 8, the first 4 and last 4 among them."""
    heads, n = q.shape[1], -(-q.shape[2] // BLOCK)
    generator = torch.Generator(q.device).manual_seed(n)
    block = torch.arange(n, device=q.device)
    budgets = ((block + 1) * density).ceil().clamp(min=8).minimum(block + 1).int()
    most = int(budgets.max())

    def one_head() -> BlockSelection:
        scores = torch.rand(1, 1, n, n, generator=generator, device=q.device)
        # The reference: a benchmark of attention should not stand on another kernel of ours.
        return select_blocks(scores, budgets, max_blocks=most, impl="reference")

    parts = [one_head() for _ in range(heads)]
    return BlockSelection(torch.cat([x.indices for x in parts], 1), torch.cat([x.counts for x in parts], 1))


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.config.recompile_limit = 64  # once for every length
    return torch.compile(flex.flex_attention, dynamic=False)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Prepared:
    """FlexAttention on the same blocks: the diagonal one with a causal mask, the others without any."""
    from torch.nn.attention.flex_attention import BlockMask

    n = -(-q.shape[2] // BLOCK)
    counts = selection.counts
    full = torch.zeros(*counts.shape, n, dtype=torch.int32, device=q.device)
    full[..., : selection.indices.shape[-1]] = selection.indices
    diagonal = torch.zeros_like(full)
    diagonal[..., 0] = torch.arange(n, dtype=torch.int32, device=q.device)
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        diagonal,
        counts - 1,
        full.clamp_(0, n - 1),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_causal,
        seq_lengths=(q.shape[2], q.shape[2]),
    )
    return partial(_compiled_flex(), q, k, v, block_mask=mask, enable_gqa=True), selection
