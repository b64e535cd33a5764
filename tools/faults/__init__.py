"""Break a real job on purpose and count what became of its documents: python -m tools.faults COMMAND

table: each fault once, on a small job of its own: workers and driver killed, a document that kills, hangs or fills the
memory, SIGTERM. kills: many short documents; a random worker is killed every few seconds and the driver every minute,
then it resumes. restarts: the driver of a small job is killed at random moments, many times. soak: work without a
pause, memory told. bucket: the demo documents in an S3-compatible server on this machine; the job is killed halfway and
resumed. determinism: the share of documents whose outputs stay the same in any company, order and chunks.
Each prints its table; all but determinism, which only measures, exit with 0 only if no document was lost or doubled.
"""
