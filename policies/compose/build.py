"""From policies to a composition of them."""

from collections.abc import Mapping
from typing import Any

from embodied.core.config import component, convert
from embodied.core.errors import ConfigError
from policies.checkpoint import policy_state
from policies.compose.members import Member, check_actions, relation
from policies.compose.policy import (
    ComposedConfig,
    ComposedPolicy,
    check_denoiser,
    composed_spec,
)
from policies.compose.pooled import PooledConfig, PooledPolicy, pooled_spec

POOLED = "pooled"
"""As an operator, it says that the composition is at sample level."""


def compose(
    policies: Mapping[str, Any],
    operator: Mapping[str, Any],
    *,
    solver: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
) -> ComposedPolicy | PooledPolicy:
    """A composition of trained policies by label, in the operator's order of weights.

    operator: name and options; "pooled" takes those of PooledConfig. solver: one for the mix.
    guidance: options of Guidance. The policies become the composition's members, not copies.
    ConfigError says which policy does not go with the others, and why.
    """
    labels = tuple(policies)
    if not labels:
        raise ConfigError("a composition needs at least one policy")
    specs = [policy.spec for policy in policies.values()]
    states = [policy_state(policy)[0] for policy in policies.values()]
    if operator.get("name") == POOLED:
        if solver or guidance:
            raise ConfigError(
                "operator=pooled takes no solver and no guidance: it combines samples"
            )
        members = [Member(label=n, policy=s) for n, s in zip(labels, states, strict=True)]
        options = {k: v for k, v in operator.items() if k != "name"}
        config = convert(options | {"members": members}, PooledConfig, "operator")
        return PooledPolicy(pooled_spec(labels, specs), config, list(policies.values()))
    check_actions(labels, specs)
    kind, options = component("operators", operator, "operator")
    active = kind(options, labels, specs[0].action.size).active()
    if not active:
        raise ConfigError(f"operator={operator['name']} gives no member a weight")
    first = labels[active[0]]
    members = []
    for index, (label, state) in enumerate(zip(labels, states, strict=True)):
        check_denoiser(label, policies[label])
        ratio, shift = 1.0, ()
        if index in active:
            normalizers = (policies[n].action_normalizer for n in (first, label))
            ratio, shift = relation(*normalizers, labels=(first, label))
        members.append(Member(label=label, policy=state, ratio=ratio, shift=shift))
    config = convert(
        {
            "members": members,
            "operator": dict(operator),
            "solver": solver and dict(solver),
            "guidance": guidance and dict(guidance),
        },
        ComposedConfig,
        "composition",
    )
    return ComposedPolicy(composed_spec(labels, specs, active), config, list(policies.values()))
