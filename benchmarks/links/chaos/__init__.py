"""Runs across a network whose processes are killed and whose link is cut, again and again."""
