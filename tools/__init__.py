"""What those who work on Stemline run, from a checkout: python -m tools lists it. Not in the wheel."""
