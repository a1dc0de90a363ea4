"""A policy that is asked over a link. Shapes: B rows, To history, H chunk, D action."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied.comms.channels import RequestClient, Requests
from embodied.core.errors import (
    ConfigError,
    CorruptDataError,
    EmbodiedError,
    LinkError,
    NoActionError,
    SpecError,
)
from embodied.core.protocols import Carry, Policy
from embodied.core.specs import PolicySpec
from embodied.run.remote import messages as m
from embodied.run.remote.reachability import Reachability
from embodied.run.remote.requests import Form, Request, read_fresh, request_arrays

PROBES_WITH_LOCAL = 3
"""Answers in a row that a server must give before it takes over again from a local policy."""

_ANSWER_S = 5.0
_RETRY_S = 0.05
_KEPT = 20
_REMOTE, _LOCAL = "remote/", "local/"


class RemotePolicy:
    """A Policy and Distant: each decision is asked of a policy server.

    If none comes in time, the local policy decides where there is one, else NoActionError is
    raised. On a robot whose time does not wait, a decision has as long as `allow` said; with a
    local policy, as long as the committed actions play less what that needs (the median of the
    last), but half of that time at least. Others wait up to 5 s. If decisions that were asked for
    fail for patience_s it is a LinkError. See Reachability for when the server is asked again;
    without a local policy one answer is enough.

    The carry holds what both policies remember; who does not decide begins anew.
    version: of what decided last. local: the policy here, None without one. local_version: its,
    whose weights may be renewed between decisions. local_decisions: how many it has made.
    """

    def __init__(
        self,
        requests: Requests,
        *,
        patience_s: float,
        connect_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Asks what is served for up to connect_s: LinkError without an answer by then,
        CorruptDataError for one that cannot be used."""
        self._requests = requests
        self._patience_s = patience_s
        self._clock = clock
        described, arrays = _described(requests, connect_s, clock)
        self._fingerprint = described.fingerprint
        try:
            self._form = Form(described.spec, read_fresh(arrays), described.rows)
        except (SpecError, ConfigError) as error:
            raise CorruptDataError(f"a policy server describes itself wrongly: {error}") from error
        self.spec: PolicySpec = described.spec
        self.version = described.version
        self.local_decisions = 0
        self.local_version = -1
        self.local: Policy | None = None
        self._local_s: deque[float] = deque(maxlen=_KEPT)
        self._reachability = Reachability(requests, needed=1, clock=clock)
        self._allowed: tuple[float, float] | None = None
        self._silent_since_s: float | None = None

    def fall_back_to(self, local: Policy, version: int) -> None:
        """Have a policy here decide when the server does not; before the first decision.
        ConfigError for one that does not fit in."""
        _check_local(local.spec, self.spec)
        self.local, self.local_version = local, version
        self._local_s.append(_time_of(local, self._clock))
        self._reachability = Reachability(
            self._requests, needed=PROBES_WITH_LOCAL, clock=self._clock
        )

    def allow(self, committed_s: float, useful_s: float) -> None:
        """See Distant."""
        self._allowed = committed_s, useful_s

    def init(self, batch: int) -> Carry | None:
        """See Policy."""
        fresh = self._form.fresh or {}
        carry = {f"{_REMOTE}{key}": np.repeat(value, batch, 0) for key, value in fresh.items()}
        if self.local is not None:
            own = self.local.init(batch) or {}
            carry |= {f"{_LOCAL}{key}": value for key, value in own.items()}
        return carry or None

    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """See Policy. NoActionError, or LinkError once patience is over, without a decision;
        SpecError and other errors for a request that the server refuses as wrong."""
        rows = len(seed)
        if rows > self._form.max_rows:
            raise ConfigError(
                f"{rows} rows decide together, and the policy server takes {self._form.max_rows}: "
                "lower rows here, or start it with a greater rows"
            )
        full = {**(self.init(rows) or {}), **(carry or {})}
        began_s = self._clock()
        reason = "it is not asked until it has been ready for a while"
        if self._asked():
            own = _part(full, _REMOTE) if self._form.fresh else None
            wait_s = self._wait_s()
            try:
                kept, actions_BHD = self._ask(Request(dict(obs), seed, own, prefix), wait_s)
            except LinkError as error:
                reason = str(error)
                self._reachability.failed()
                if self.local is None and self._allowed is None:
                    time.sleep(min(_RETRY_S, max(0.0, wait_s - (self._clock() - began_s))))
            else:
                self._reachability.succeeded()
                self._silent_since_s = None
                return self._carry(rows, _REMOTE, kept), actions_BHD
        if self.local is not None:
            return self._decide_locally(self.local, full, obs, prefix, seed)
        self._silent_since_s = began_s if self._silent_since_s is None else self._silent_since_s
        silent_s = self._clock() - self._silent_since_s
        if silent_s > self._patience_s:
            raise LinkError(f"no decision from the policy server in {silent_s:.0f} s: {reason}")
        raise NoActionError(f"no decision from the policy server: {reason}")

    def sample(self, obs: Any, n: int, *, seed: int) -> Any:
        """Not over a link."""
        raise EmbodiedError("a served policy only acts: load its checkpoint to sample from it")

    def loss(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Not over a link."""
        raise EmbodiedError("a served policy only acts: load its checkpoint to train it")

    def close(self) -> None:
        """Close the connection."""
        self._requests.close()

    def _asked(self) -> bool:
        if self.local is None and self._allowed is None:
            return True
        return self._reachability.usable()

    def _wait_s(self) -> float:
        """Time for an answer; nothing is committed at an episode's start and while it holds."""
        if self._allowed is None:
            return _ANSWER_S
        committed_s, useful_s = self._allowed
        if self.local is None or committed_s == 0:
            return useful_s
        local_s = float(np.median(self._local_s))
        return min(useful_s, max(committed_s - local_s, committed_s / 2))

    def _ask(self, request: Request, wait_s: float) -> tuple[Carry | None, np.ndarray]:
        time_left_ms = min(max(1, int(1e3 * wait_s)), m.MAX_TIME_LEFT_MS)
        header, arrays = self._requests.request(
            m.Act(self._fingerprint, time_left_ms), request_arrays(request), wait_s
        )
        if not isinstance(header, m.Acted):
            raise CorruptDataError(f"a policy server answered {type(header).__name__} to Act")
        try:
            decision = self._form.check_answer(arrays, request.rows)
        except SpecError as error:
            raise CorruptDataError(f"a policy server's decision: {error}") from error
        self.version = header.version
        return decision

    def _decide_locally(
        self,
        policy: Policy,
        carry: Carry,
        obs: Mapping[str, np.ndarray],
        prefix: np.ndarray | None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        spec = policy.spec
        seen = {key: obs[key][:, -spec.n_obs_steps :] for key in spec.observation}
        started_s = self._clock()
        own = _part(carry, _LOCAL) or None
        kept, actions_BHD = policy.act(own, seen, prefix=prefix, seed=seed)
        self._local_s.append(self._clock() - started_s)
        self._silent_since_s = None
        self.version = self.local_version
        self.local_decisions += 1
        return self._carry(len(seed), _LOCAL, kept), actions_BHD

    def _carry(self, rows: int, whose: str, kept: Carry | None) -> Carry | None:
        """What is remembered after a decision of one of the two: the other begins anew."""
        own = {f"{whose}{key}": value for key, value in (kept or {}).items()}
        return {**(self.init(rows) or {}), **own} or None


def connect(
    address: str,
    *,
    patience_s: float,
    connect_s: float,
    local: Policy | None = None,
    local_version: int = -1,
) -> RemotePolicy:
    """The policy that is served at an address inside this host; local: what it falls back to.

    ConfigError for an address of no known kind, LinkError if no server is ready there within
    connect_s; other errors as of RemotePolicy.
    """
    client = RequestClient(address, m.REPLIES)
    try:
        remote = RemotePolicy(client, patience_s=patience_s, connect_s=connect_s)
        if local is not None:
            remote.fall_back_to(local, local_version)
        return remote
    except LinkError as error:
        client.close()
        raise LinkError(
            f"inference.remote={address}: {error} Start one with: embodied serve checkpoint=… "
            f"listen={address}"
        ) from error
    except EmbodiedError:
        client.close()
        raise


def _described(
    requests: Requests, connect_s: float, clock: Callable[[], float]
) -> tuple[m.Described, dict[str, np.ndarray]]:
    ends_s = clock() + connect_s
    while True:
        try:
            header, arrays = requests.request(m.Describe(), {}, max(0.0, ends_s - clock()))
        except LinkError:  # not there yet, or warming up
            if clock() + _RETRY_S >= ends_s:
                raise
            time.sleep(_RETRY_S)
            continue
        if not isinstance(header, m.Described):
            raise CorruptDataError(f"a policy server answered {type(header).__name__} to Describe")
        return header, arrays


def _time_of(policy: Policy, clock: Callable[[], float]) -> float:
    """What a decision on zeros takes, in s."""
    spec = policy.spec
    nothing = {
        key: np.zeros((1, spec.n_obs_steps, *array.shape), array.dtype)
        for key, array in spec.observation.items()
    }
    started_s = clock()
    policy.act(policy.init(1), nothing, seed=np.zeros(1, np.int64))
    return clock() - started_s


def _part(carry: Carry, whose: str) -> Carry:
    return {k.removeprefix(whose): value for k, value in carry.items() if k.startswith(whose)}


def _check_local(local: PolicySpec, served: PolicySpec) -> None:
    """ConfigError unless a local policy can take a served one's decisions."""
    for name in ("horizon", "n_action_steps"):
        if getattr(local, name) != getattr(served, name):
            raise ConfigError(
                f"the local policy has {name}={getattr(local, name)}, the served one "
                f"{getattr(served, name)}: they must agree"
            )
    if local.action.shape != served.action.shape or local.n_obs_steps > served.n_obs_steps:
        raise ConfigError(
            f"the local policy acts in {local.action.shape} by {local.n_obs_steps} observations, "
            f"the served one in {served.action.shape} by {served.n_obs_steps}: it may not need more"
        )
    for key, array in local.observation.items():
        found = served.observation.get(key)
        if found is None or (found.shape, found.dtype) != (array.shape, array.dtype):
            raise ConfigError(f"the local policy reads '{key}' as the served one does not")
