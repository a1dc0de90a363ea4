"""Measurements of links between hosts."""
