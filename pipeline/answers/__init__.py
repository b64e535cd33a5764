"""Answers by a JSON Schema: what can be asked for, the Arrow type of answers, the grammar for decoding."""
