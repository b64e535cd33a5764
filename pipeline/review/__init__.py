"""What a document's own text tells of an output: where it stands there, and what is suspicious about it."""
