"""What a job can be told: each setting is declared once; flags, job files and keyword arguments are made from it."""
