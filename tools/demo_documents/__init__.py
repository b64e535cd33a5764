"""The documents of the demo, and the findings in them."""
