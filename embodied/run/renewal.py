"""Newer weights for a policy that acts, made ready by a thread beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from embodied.weights.store import WeightManifest, WeightWatcher

if TYPE_CHECKING:  # it loads torch, which a host that asks a policy server need not have
    from policies.inference.policy import ActingPolicy

    Make = Callable[[WeightManifest, Mapping[str, np.ndarray]], ActingPolicy]

_POLL_S = 0.05


class Renewal:
    """Reads, checks and lays out what a watcher finds; `take`, between decisions, is all that the
    thread that acts has to do for it.

    policy: what acts, None before the first weights were taken.
    """

    def __init__(self, watcher: WeightWatcher, policy: ActingPolicy | Make) -> None:
        """policy: what acts, or how to make it of the first weights."""
        self._make = policy if callable(policy) else None
        self.policy = None if callable(policy) else policy
        self._watcher = watcher
        self._ready: tuple[ActingPolicy, WeightManifest] | None = None
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._following: Future[None] | None = None

    @property
    def fault(self) -> str:
        """Why the newest weights were passed over; "" if they were not."""
        error = self._watcher.last_error
        return "" if error is None else str(error)

    def take(self) -> WeightManifest | None:
        """Act with the newest weights that are ready; None if there are none. The first call
        begins to follow.

        What ended the thread is raised: CorruptDataError for weights that are not this policy's,
        ConfigError for a policy that is not known here.
        """
        if self._following is None:
            self._following = self._thread.submit(self._follow)
        if self._following.done():
            self._following.result()
        if self._ready is None:
            return None
        policy, manifest = self._ready
        if policy is self.policy:
            policy.swap()
        self.policy = policy
        self._ready = None  # last: from here on the thread may use what acted before
        return manifest

    def _follow(self) -> None:
        while not self._closing.wait(_POLL_S):
            if self._ready is not None:
                continue
            newest = self._watcher.poll()
            if newest is None:
                continue
            arrays, manifest = newest
            policy = self.policy
            if policy is None:
                assert self._make is not None
                policy = self._make(manifest, arrays)
            policy.prepare(arrays)  # of the first ones as well: later ones then find the memory
            self._ready = policy, manifest

    def close(self) -> None:
        """Stop following; the policy stays as it is."""
        self._closing.set()
        self._thread.shutdown()
