"""Encoders that turn observations into the vector that conditions a policy."""
