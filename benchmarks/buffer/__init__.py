"""Measurements of the buffer: `python -m benchmarks.buffer`."""
