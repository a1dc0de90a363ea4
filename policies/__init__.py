"""Policies: networks, schedules, samplers, their checkpoints, and what builds them."""
