"""What became of a job, or of several side by side: a page, a table in the terminal, or JSON."""
