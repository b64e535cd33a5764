"""Engines in processes of their own, and which document goes to which of them."""
