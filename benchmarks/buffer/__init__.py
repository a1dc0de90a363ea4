"""The buffer against the machine's limits and against other buffers: `python -m benchmarks.buffer`."""
