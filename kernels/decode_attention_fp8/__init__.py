"""One query token per live document against that document's own extent of an fp8 KV arena."""

from kernels.decode_attention_fp8.api import choose_decode_attention_fp8, decode_attention_fp8

__all__ = ["choose_decode_attention_fp8", "decode_attention_fp8"]
