"""Arithmetic on sizes for code on the host. Triton's `cdiv` and `next_power_of_2` take microseconds a call there."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
