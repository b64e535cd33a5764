"""Dense attention against Stem on a sample of the user's own documents: how much faster, and how much different."""
