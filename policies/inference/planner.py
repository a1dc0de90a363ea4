"""How many solver steps a decision may take, on this machine and at this control rate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied.core.errors import ConfigError
from policies.inference.policy import ActingPolicy


@dataclass(frozen=True, slots=True)
class Plan:
    """What was chosen. budget_ms: time that a decision may take. reason: in words, with numbers."""

    num_steps: int
    n_action_steps: int
    p95_ms: float
    budget_ms: float
    reason: str


def budget_ticks(horizon: int, executed: int, delay: int | None) -> int:
    """Ticks that a decision may take: the d that committed actions fill, and d ≤ H − s.

    It may not take longer than the s ticks until the next one either. delay: d, if it is given.
    """
    most = min(horizon - executed, executed)
    return most if delay is None else min(delay, most)


def choose(
    p95_s: Callable[[int], float],
    *,
    tick_hz: float,
    horizon: int,
    num_steps: Sequence[int],
    n_action_steps: Sequence[int],
    delay: int | None = None,
) -> Plan:
    """The most solver steps that fit; with them, the fewest executed actions that leave the time.

    p95_s: time that 95 % of the decisions with so many steps need at most; it is asked for rising
    numbers until one does not fit. ConfigError if not even the fewest do.
    """
    steps, executed = sorted(set(num_steps)), sorted(set(n_action_steps))
    if not steps or steps[0] < 1:
        raise ConfigError(f"num_steps to choose from are {steps}; give numbers from 1")
    if not executed or not 1 <= executed[0] <= executed[-1] <= horizon:
        raise ConfigError(f"n_action_steps to choose from are {executed}; give 1..{horizon}")
    budgets_s = {s: budget_ticks(horizon, s, delay) / tick_hz for s in executed}
    roomiest_s = max(budgets_s.values())
    fitting: tuple[int, float] | None = None
    beyond = ""
    for n in steps:
        needed_s = p95_s(n)
        if needed_s > roomiest_s:
            beyond = f"; {n} steps need {1e3 * needed_s:.1f} ms"
            break
        fitting = n, needed_s
    if fitting is None:
        raise ConfigError(
            f"{steps[0]} solver steps do not fit{beyond}, and at {tick_hz:g} Hz a chunk of "
            f"{horizon} leaves {1e3 * roomiest_s:.1f} ms at best; lower the control rate, lengthen "
            "the horizon, allow fewer steps, or take a smaller network"
        )
    chosen, needed_s = fitting
    s = min(s for s in executed if needed_s <= budgets_s[s])
    return Plan(
        chosen,
        s,
        1e3 * needed_s,
        1e3 * budgets_s[s],
        f"{chosen} solver steps need {1e3 * needed_s:.1f} ms (p95) of the "
        f"{1e3 * budgets_s[s]:.1f} ms that {s} executed actions of {horizon} leave at "
        f"{tick_hz:g} Hz{beyond or '; no more were allowed'}",
    )


def measured(
    policy: ActingPolicy,
    *,
    decisions: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[int], float]:
    """p95 of decisions on observations of zeros, in s, as a function of the solver's steps.

    As on a robot whose time does not wait: after a first decision, with committed actions.
    """

    def p95_s(num_steps: int) -> float:
        policy.set_steps(num_steps)
        rows, spec = policy.rows, policy.spec
        obs: Any = policy.nothing()
        committed = min(spec.n_action_steps, spec.horizon - spec.n_action_steps)
        zeros = np.zeros((rows, committed, spec.action.size), np.float32)
        prefix = zeros if committed else None
        carry, _ = policy.act(policy.init(rows), obs, seed=np.zeros(rows, np.int64))
        times_s: list[float] = []
        for decision in range(decisions):
            started_s = clock()
            policy.act(carry, obs, prefix=prefix, seed=np.full(rows, decision))
            times_s.append(clock() - started_s)
        return float(np.percentile(times_s, 95))

    return p95_s


def fit(
    policy: ActingPolicy,
    tick_hz: float,
    num_steps: Sequence[int],
    *,
    n_action_steps: Sequence[int] | None = None,
    delay: int | None = None,
) -> Plan:
    """Measure, choose, and set the policy accordingly; see `choose`."""
    plan = choose(
        measured(policy),
        tick_hz=tick_hz,
        horizon=policy.spec.horizon,
        num_steps=num_steps,
        n_action_steps=n_action_steps or (policy.spec.n_action_steps,),
        delay=delay,
    )
    policy.set_steps(plan.num_steps, plan.n_action_steps)
    return plan
