"""Policies that decide in tokens, one after another."""
