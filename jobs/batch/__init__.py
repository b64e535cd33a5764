"""OpenAI's batch format as a job: requests in, one line of output for each."""
