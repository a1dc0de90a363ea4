"""Whether a policy server is asked at all: a rule that does not flap."""

import time
from collections.abc import Callable

from embodied.comms.channels import Requests
from embodied.run.remote import messages as m

MAX_FAILURES = 2
"""Decisions in a row that may fail before the server is not asked any more."""

PROBE_EVERY_S = 0.25
PROBE_WAIT_S = 1.0


class Reachability:
    """After MAX_FAILURES failed decisions in a row the server is asked only how it is, without
    waiting: when a decision is due, and at most every PROBE_EVERY_S. After `needed` answers in a
    row that it is ready, it is asked for decisions again; an answer that is not there when it is
    looked for after PROBE_WAIT_S counts as none. A decision in time forgets former failures.
    """

    def __init__(
        self, requests: Requests, *, needed: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = requests
        self._needed = needed
        self._clock = clock
        self._failures = 0
        self._good = 0
        self._probe: int | None = None
        self._probed_s = 0.0

    def succeeded(self) -> None:
        """A decision came in time."""
        self._failures = 0

    def failed(self) -> None:
        """One did not."""
        self._failures += 1
        self._good = 0

    def usable(self) -> bool:
        """Whether to ask for the next decision; while not, this sends and receives probes."""
        if self._failures < MAX_FAILURES:
            return True
        self._receive()
        if self._good >= self._needed:
            self._failures = self._good = 0
            self._drop_probe()
            return True
        if self._clock() - self._probed_s >= PROBE_EVERY_S and self._probe is None:
            self._probed_s = self._clock()
            self._probe = self._requests.send(m.Check(), {})
            if self._probe is None:
                self._good = 0
        return False

    def _receive(self) -> None:
        if self._probe is None:
            return
        for reply in self._requests.receive_ready():
            if reply.id == self._probe:
                self._probe = None
                ready = isinstance(reply.header, m.Health) and reply.header.ready
                self._good = self._good + 1 if ready else 0
        if self._probe is not None and self._clock() - self._probed_s > PROBE_WAIT_S:
            self._drop_probe()
            self._good = 0

    def _drop_probe(self) -> None:
        if self._probe is not None:
            self._requests.forget(self._probe)
            self._probe = None
