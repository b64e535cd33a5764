"""A picture of sparse prefill on one document: which key blocks each head's query blocks keep."""
