"""Work on the devices: prompts prefilled in chunks, and decode steps of a batch of documents."""
