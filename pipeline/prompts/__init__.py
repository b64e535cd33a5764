"""From a task and a document to token ids, and from token ids to an answer."""
