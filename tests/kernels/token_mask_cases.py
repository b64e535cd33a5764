"""What every implementation of mask_tokens must satisfy; used compiled, interpreted and on the CPU."""

from __future__ import annotations

import torch

from kernels.token_mask import mask_tokens

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Whole words and rests of them; more than one block of the kernel; Qwen's size and one word more.
VOCABULARIES = (1, 31, 32, 33, 2048, 9001, 151_936)


def check(dtype: torch.dtype, impl: str, device: str) -> None:
    """Against bits that are read one by one, in strided rows, with rows between that are not masked."""
    for V in VOCABULARIES:
        S, W = 5, -(-V // 32) + 1
        generator = torch.Generator().manual_seed(V)
        wide = torch.randn(S, V + 7, generator=generator).to(device, dtype)
        before, logits = wide.clone(), wide[:, :V]
        words = torch.randint(-(2**31), 2**31, (S, W + 1), generator=generator, dtype=torch.int64).to(torch.int32)
        words[2] = 0  # nothing may come
        words[3] = -1  # everything may
        words[:, W] = torch.tensor([1, 0, 1, 7, 0])
        allowed = [[int(word) >> bit & 1 for word in row[:W].tolist() for bit in range(32)][:V] for row in words]
        table = words.to(device)
        mask_tokens(logits, table[:, :W], table[:, W], impl=impl)
        forbidden = (torch.tensor(allowed) == 0) & torch.tensor([1, 0, 1, 1, 0]).bool()[:, None]
        expected = before[:, :V].masked_fill(forbidden.to(device), float("-inf"))
        assert torch.equal(logits, expected), f"vocabulary {V}"
        assert torch.equal(wide[:, V:], before[:, V:])
        assert torch.isinf(logits[2]).all()
        assert torch.isfinite(logits[[1, 3, 4]]).all()
