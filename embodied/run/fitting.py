"""A policy's solver steps, fitted to the robot that it is to move."""

from typing import Any

from embodied.run.remote.policy import RemotePolicy
from hal.commander import Leasable


def fit_to(policy: Any, device: Leasable) -> str:
    """Set the solver's steps to what the device's control period allows, and say why.

    policy: an ActingPolicy, or a RemotePolicy, of which only the fallback's are set. "" for a
    device whose time waits, and for a policy that is to keep its own number. ConfigError if not
    even the fewest steps fit.
    """
    from policies.inference.planner import fit

    if isinstance(policy, RemotePolicy):
        policy = policy.local
    if policy is None or not (policy.config.num_steps and device.realtime):
        return ""
    return fit(policy, device.spec.tick_hz, policy.config.num_steps).reason
