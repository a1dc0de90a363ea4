"""How long the slow tests are: in full with EMBODIED_FULL=1, else what a landing has time for."""

import os

import pytest

FULL = bool(os.environ.get("EMBODIED_FULL"))
full_only = pytest.mark.skipif(not FULL, reason="takes minutes; EMBODIED_FULL=1 runs it")


def size(full: int, usual: int) -> int:
    """The number of cases of a slow test."""
    return full if FULL else usual
