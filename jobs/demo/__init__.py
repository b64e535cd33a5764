"""The demo: documents whose findings are known, and a run that counts how many the summaries hold."""
