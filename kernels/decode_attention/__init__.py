"""One query token per live document against that document's own extent of the KV arena."""

from kernels.decode_attention.api import choose_decode_attention, decode_attention

__all__ = ["choose_decode_attention", "decode_attention"]
