"""Benchmarks that check before they time: `python -m tools.benchmark attention --lengths 4096 32768 --output DIR`."""
