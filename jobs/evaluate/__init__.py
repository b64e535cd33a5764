"""How much a model still finds in long documents under sparse prefill: RULER-like tasks, several arms, one run."""
