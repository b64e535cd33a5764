"""One query token per live document against that document's own extent of the KV arena."""

from kernels._common.prefixes import Prefixes
from kernels.decode_attention.api import choose_decode_attention, decode_attention

__all__ = ["Prefixes", "choose_decode_attention", "decode_attention"]
