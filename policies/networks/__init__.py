"""Networks that map a noisy chunk, a time and a conditioning vector to a chunk."""
