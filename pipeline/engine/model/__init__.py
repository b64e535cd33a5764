"""The model: read from a checkpoint or made at random, placed on its devices, checked, and called."""
