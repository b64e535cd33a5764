"""What a person runs: `python -m jobs.<name> --help`."""
