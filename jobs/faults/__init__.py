"""Break a real job on purpose and count what became of its documents: python -m jobs.faults kills|restarts|soak|bucket

kills: many short documents; a random worker is killed every few seconds and the driver every minute, then it resumes.
restarts: the driver of a small job is killed at random moments, many times. soak: work without a pause, memory told.
bucket: the demo documents in an S3-compatible server on this machine; the job is killed halfway and resumed.
Each prints its table and exits with 0 only if no document was lost or doubled.
"""
