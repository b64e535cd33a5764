"""Runs a tiny random model of every type that transformers has, and compares it with transformers: docs/models.md."""
