"""A host's leave to be connected: given when it dials, asked for again while it stays."""

import time
from collections.abc import Callable

from embodied.core.errors import EmbodiedError

CHECK_S = 1.0
"""Least time between two checks of a session."""


class Admission:
    """The leave of one session, which has just been given.

    ask: raises the EmbodiedError for which the host is to be refused. One refusal may come of a
    list of revoked certificates that is being copied, so the second in a row counts.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._asked_s = time.monotonic()
        self._refused = False

    def check(self) -> None:
        """Ask again if it is time to. Raises what `ask` raised, when it did the last time too."""
        now_s = time.monotonic()
        if now_s - self._asked_s < CHECK_S:
            return
        self._asked_s = now_s
        try:
            self._ask()
            self._refused = False
        except EmbodiedError:
            if self._refused:
                raise
            self._refused = True
