"""What is measured on an engine from outside: how likely it finds a given output, how long a decode step takes."""
