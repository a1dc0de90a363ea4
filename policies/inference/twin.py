"""Policies with acting networks in the place of their own."""

import copy
from typing import Any

from torch import nn

from embodied.core.errors import ConfigError
from policies.acting import InferenceConfig
from policies.base import GenerativePolicy
from policies.compose.policy import ComposedPolicy
from policies.compose.superposition import Superposition
from policies.inference.network import ActingNetwork
from policies.inference.process import MemberProcess


def needs_gradients(policy: Any, config: InferenceConfig) -> bool:
    """Whether decisions ask for gradients: for whole real-time chunking, or a critic's push."""
    rtc = config.rtc or getattr(policy, "rtc", None)
    if rtc is not None and rtc.mode == "full":
        return True
    modules = policy.modules() if isinstance(policy, nn.Module) else ()
    return any(isinstance(m, ComposedPolicy) and m.config.guidance is not None for m in modules)


def acting_twin(policy: Any, config: InferenceConfig, *, gradients: bool) -> Any:
    """The policy with acting networks; what has no generative policy in it, as it is.

    gradients: whether they will be asked for; then all members are computed in this process.
    LinkError for a member's process that does not start.
    """

    def made(child: Any) -> Any:
        return child and acting_twin(child, config, gradients=gradients)

    if not isinstance(policy, nn.Module):
        return policy
    twin = copy.copy(policy)
    if isinstance(policy, ComposedPolicy) and isinstance(twin, ComposedPolicy):
        elsewhere = _launch(policy, config) if config.parallel and not gradients else {}
        here = (m if i in elsewhere else made(m) for i, m in enumerate(policy.members))
        twin._modules = {**policy._modules, "members": nn.ModuleList(here)}
        for process in elsewhere.values():
            process.build()
            process.load()
        twin.elsewhere = elsewhere
    else:
        twin._modules = {name: made(child) for name, child in policy._modules.items()}
    if not isinstance(twin, GenerativePolicy):
        return twin
    superposed = isinstance(twin, ComposedPolicy) and isinstance(twin.operator, Superposition)
    bent = config.warm_start is not None or (config.rtc is not None and config.rtc.mode != "copy")
    if superposed and bent:
        raise ConfigError(
            "operators 'or' and 'and' need their path from pure noise: leave inference.warm_start "
            "null, and inference.rtc null or of mode=copy"
        )
    twin.ahead = True
    twin.rtc = config.rtc or twin.rtc
    twin.warm_start = config.warm_start or twin.warm_start
    if not isinstance(twin, ComposedPolicy):
        network = ActingNetwork(twin.network, config, gradients=gradients)
        twin._modules["network"] = network.eval()
    return twin


def refresh(twin: Any) -> None:
    """Take over the source's present weights, here and in the members' processes."""
    for module in twin.modules() if isinstance(twin, nn.Module) else ():
        if isinstance(module, ActingNetwork):
            module.refresh()
    for process in processes(twin):
        process.load()


def processes(twin: Any) -> list[MemberProcess]:
    """Those in which members of the policy, or of what it is made of, compute."""
    modules = twin.modules() if isinstance(twin, nn.Module) else ()
    found = [m.elsewhere.values() for m in modules if isinstance(m, ComposedPolicy)]
    return [process for group in found for process in group if isinstance(process, MemberProcess)]


def _launch(policy: ComposedPolicy, config: InferenceConfig) -> dict[int, MemberProcess]:
    """For all members in use but the first; a composition's own members have processes instead."""
    return {
        i: MemberProcess(policy.labels[i], member, config)
        for i in policy.active[1:]
        if isinstance(member := policy.members[i], GenerativePolicy)
        and not isinstance(member, ComposedPolicy)
    }
