"""fp8 attention for the benchmark of one layer: operands under static scales, the calls to time, their emulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8, choose_block_sparse_attention_fp8
from kernels.block_sparse_attention_fp8.reference import round_weights
from kernels.fp8_heads import (
    FP8,
    FP8_MAX,
    KEY_GROUP,
    HeadScales,
    bias_shape,
    join_bias,
    key_bias,
    quantize_heads,
    write_kv,
)
from kernels.fp8_heads.reference import quantize, restore_keys

HEADROOM = 16.0


class Fp8Layer:
    """q [1, H, L, D], k and v [1, Hkv, L, D] and what fp8 attention makes of them; arenas as long as the prompt."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.q, self.k, self.v = q, k, v

    @property
    def _group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def scales(self) -> HeadScales:
        """Powers of two, the largest value of each head times HEADROOM in range; the queries' mean."""
        largest = (torch.stack([head.abs().amax() for head in x[0]]).float() for x in (self.q, self.k, self.v))
        mean = torch.stack([head.float().mean(0) for head in self.q[0]]).bfloat16().float()
        q, k, v = (torch.exp2((x * HEADROOM / FP8_MAX).log2().ceil()) for x in largest)
        return HeadScales(q, k, v, q_mean=mean)

    @cached_property
    def arenas(self) -> tuple[Tensor, Tensor]:
        _, heads, length, dim = self.k.shape
        tokens = -(-length // KEY_GROUP) * KEY_GROUP
        k8 = torch.empty(heads, tokens, dim, dtype=FP8, device=self.k.device)
        vt8 = torch.empty(heads, dim, tokens, dtype=FP8, device=self.k.device)
        return k8, vt8

    @cached_property
    def bias(self) -> Tensor:
        """What the mean query adds to the keys' scores, which prepare() fills."""
        kv_heads, tokens, _ = self.arenas[0].shape
        shape = bias_shape(kv_heads * self._group, kv_heads, tokens)
        return torch.empty(shape, dtype=FP8, device=self.k.device)

    def prepare(self) -> Tensor:
        """Quantise q, k and v, V transposed: what a layer pays besides its attention. Returns q in fp8."""
        write_kv(self.k, self.v, self.scales, *self.arenas, 0)
        key_bias(self.k, self.scales, self.bias, 0)
        return quantize_heads(self.q, self.scales.q, self.scales.q_mean)

    @cached_property
    def q8(self) -> Tensor:
        return self.prepare()

    def attend(self, q8: Tensor, selection: BlockSelection | None, impl: str = "auto") -> Tensor:
        k8, vt8 = self.arenas
        out = block_sparse_attention_fp8(
            q8, k8[None], vt8[None], self.scales, selection, bias=self.bias[None], impl=impl
        )
        assert isinstance(out, Tensor)
        return out

    def impls(self) -> tuple[tuple[str, ...], str]:
        """Implementations to time, and why the fastest is missing."""
        k8, vt8 = self.arenas
        best = choose_block_sparse_attention_fp8(self.q, k=k8[None], vt=vt8[None])
        return ("gluon", "triton") if best.impl == "gluon" else ("triton",), best.reason

    def case(self, selection: BlockSelection | None, impl: str) -> tuple[Callable[[], Tensor], BlockSelection | None]:
        """Attention alone, the operands ready."""
        return partial(self.attend, self.q8, selection, impl), selection

    def stem(self, select: Callable[[], BlockSelection]) -> tuple[Callable[[], Tensor], BlockSelection]:
        """The product's path: preparation, selection from the bf16 tensors, attention."""
        return lambda: self.attend(self.prepare(), select()), select()

    def exact(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels read of a query head: q less its mean, k, v [L, D] in fp8 times their scales, as float64."""
        kv_head = head // self._group
        k8, vt8 = self.arenas
        v8 = restore_keys(vt8[kv_head]).mT
        parts = (self.q8[0, head], self.scales.q[head]), (k8[kv_head], self.scales.k[kv_head])
        q, k, v = (x.double() * scale for x, scale in (*parts, (v8, self.scales.v[kv_head])))
        return q, k[: self.k.shape[2]], v[: self.k.shape[2]]

    def biased(self, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """exact(), and what is added to the scores of each key, float64 [L]."""
        kv_head, unit = head // self._group, self.scales.q[head] * self.scales.k[head // self._group]
        biases = join_bias(self.bias[None, kv_head : kv_head + 1, :, : self.k.shape[2]], self._group)
        return *self.exact(head), biases[0, head % self._group].double() * unit

    def emulate(self, head: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """Attention of q [T, D] to k, v [K, D] of one head by the same roundings, in float32."""
        kv_head = head // self._group
        assert self.scales.q_mean is not None
        mean = self.scales.q_mean[head]
        bias = k.float() @ mean
        q, k, v = (
            quantize(x, scale).float() * scale
            for x, scale in ((q - mean, self.scales.q[head]), (k, self.scales.k[kv_head]), (v, self.scales.v[kv_head]))
        )
        scores = ((q @ k.mT + bias) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = round_weights(weights)
        return (weights @ v / weights.sum(-1, keepdim=True)).double()
