"""Waiting for a person, who may also want to stop."""

import time
from collections.abc import Callable

from embodied.core.errors import EmbodiedError
from embodied.core.protocols import Event

_POLL_S = 0.02


class PersonStopped(EmbodiedError):
    """The person ended what was going on instead of answering. event: "stop" or "estop"."""

    def __init__(self, event: Event) -> None:
        super().__init__("stopped by the person" if event == "stop" else "emergency stop")
        self.event: Event = event


def wait_for_person(
    events: Callable[[], list[Event]], meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Return when the person signals success from now on. meanwhile: called again and again.

    Raises PersonStopped for a stop or an emergency stop.
    """
    asked = False
    while True:
        for event in events():
            if event == "success" and asked:
                return
            if event in ("stop", "estop"):
                raise PersonStopped(event)
        asked = True
        meanwhile()
        time.sleep(_POLL_S)
