"""What the operations share. It imports none of them, and nothing outside of `kernels/` imports it."""
