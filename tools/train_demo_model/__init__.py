"""Trains models/tiny-reader: a small reader of long synthetic reports, from scratch, in minutes on one GPU."""
