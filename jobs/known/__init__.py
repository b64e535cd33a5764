"""Documents whose answers are known: facts woven into text, questions about them, and how a model answers."""
