"""Weights of an earlier policy to begin training with; reading this does not load torch."""

from pathlib import Path
from typing import Any

from embodied.core.errors import ConfigError
from embodied.core.specs import PolicySpec
from policies.folder import CONFIG, find_folder, read_config, spec_from_data

WHERE = "initial"
_IMPROVED = "improved"


def check_initial(path: Path, name: str, spec: PolicySpec) -> None:
    """ConfigError unless the folder, or the run, holds a policy of this name with this spec."""
    found = read_config(find_folder(path, WHERE) / CONFIG)
    if found["policy"] == _IMPROVED:
        found = found["options"]["policy"]
    if found["policy"] != name:
        raise ConfigError(
            f"{WHERE}={path} is a policy of kind '{found['policy']}'; the run trains '{name}'"
        )
    earlier = spec_from_data(found.get("spec"), WHERE)
    if earlier == spec:
        return
    differing = [
        f"{field} is {getattr(earlier, field)} there and {getattr(spec, field)} here"
        for field in spec.__struct_fields__
        if getattr(earlier, field) != getattr(spec, field)
    ]
    raise ConfigError(f"{WHERE}={path} reads or produces something else: {'; '.join(differing)}")


def begin_with(policy: Any, path: Path) -> None:
    """Give a fresh policy the weights and normalisers of the one in the folder, or the run.

    The proposing policy's, of an improved one. ConfigError if its arrays are others in name or
    shape.
    """
    from policies.checkpoint import load_policy

    found = load_policy(find_folder(path, WHERE))
    earlier = found.policy if found.name == _IMPROVED else found
    old, new = earlier.state_dict(), policy.state_dict()
    odd = [name for name in {**new, **old} if _shape(old, name) != _shape(new, name)]
    if odd:
        raise ConfigError(
            f"{WHERE}={path} has other arrays than the policy that is trained: {', '.join(odd[:4])}"
            f"{' and others' if len(odd) > 4 else ''}; its sizes must be the same"
        )
    policy.load_state_dict(old)


def _shape(arrays: Any, name: str) -> tuple[int, ...] | None:
    return tuple(arrays[name].shape) if name in arrays else None
