"""Trials of weights that tests play through."""

from itertools import pairwise

from embodied.weights.trial import TrialRule

RULE = TrialRule(canaries=("canary",), max_episodes=40, looks=2, baseline_episodes=10, margin=0.3)


def play(trial, version, episodes, successes):
    """Successes spread evenly; the event, if there is one."""
    reached = [number * successes // episodes for number in range(episodes + 1)]
    found = [trial.record(version, b > a) for a, b in pairwise(reached)]
    return next((event for event in found if event), None)
