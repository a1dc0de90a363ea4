"""A policy that sees, is told what to do, and acts by an expert on what it has read."""
