"""The pages in docs/, written from the code that they describe."""
