"""Embodied: robots as devices, a buffer that loses nothing, policies that learn from both."""

__version__ = "0.1.0"
