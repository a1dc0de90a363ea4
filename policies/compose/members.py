"""The policies of a composition, and how one's noisy chunks become another's. D action."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from embodied.buffer.sample.windows import FUTURE, FUTURE_IS_PAD
from embodied.core.errors import ConfigError, SpecError
from embodied.core.specs import ArraySpec, PolicySpec
from policies.conversions import Scalar, signal_noise
from policies.normalizer import LinearNormalizer

REMEDY = (
    "compose them at sample level (operator=pooled), which needs no common scale, or train one "
    "again with the other's action normalisation"
)


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One policy of a composition.

    label: what messages call it. policy: its configuration as in a checkpoint of its own.
    ratio, shift: from the composition's normalised actions x to its own, x_i = ratio·x + shift;
    no shift is the empty one.
    """

    label: str
    policy: dict[str, Any]
    ratio: float = 1.0
    shift: tuple[float, ...] = ()

    @property
    def converted(self) -> bool:
        """Whether its normalised actions are not the composition's."""
        return self.ratio != 1.0 or bool(self.shift)


def relation(
    reference: LinearNormalizer, other: LinearNormalizer, labels: tuple[str, str]
) -> tuple[float, tuple[float, ...]]:
    """(ratio, shift) that carry the reference's normalised actions to the other's.

    The noise of a noisy chunk is as strong in every dimension; it stays so, and the conversion
    exact, only if all dimensions are scaled alike. ConfigError names the dimensions that are not.
    """
    scales_D = (reference.scale.double() / other.scale.double()).cpu().numpy()
    shift_D = ((reference.offset - other.offset).double() / other.scale.double()).cpu().numpy()
    ratio = float(np.sort(scales_D)[(scales_D.size - 1) // 2])
    odd = np.flatnonzero(np.abs(scales_D / ratio - 1) > 1e-5)
    if odd.size:
        raise ConfigError(
            f"'{labels[1]}' scales actions otherwise than '{labels[0]}' in dimensions "
            f"{odd.tolist()} (its scales are {(1 / scales_D[odd]).round(4).tolist()} times the "
            f"other's, {1 / ratio:.4g} elsewhere): their noisy chunks have no exact conversion; "
            f"{REMEDY}"
        )
    ratio = 1.0 if abs(ratio - 1) < 1e-6 else ratio
    return ratio, tuple(shift_D.tolist()) if np.abs(shift_D).max() > 1e-6 else ()


def convert(member: Member, x_t: torch.Tensor, log_snr: Scalar) -> tuple[torch.Tensor, Scalar]:
    """The member's own noisy chunk and level for the composition's; the noise ε is the same.

    x_t = s x₀ + n ε and x₀ᵢ = r x₀ + δ give r x_t + s δ = s x₀ᵢ + r n ε, which over √(s² + r²n²)
    is variance-preserving again, at log_snr − 2 log r.
    """
    signal, noise = signal_noise(log_snr)
    shift_D = x_t.new_tensor(member.shift or (0.0,))
    scale = (signal**2 + (member.ratio * noise) ** 2) ** 0.5
    return (member.ratio * x_t + signal * shift_D) / scale, log_snr - 2 * math.log(member.ratio)


def check_actions(labels: Sequence[str], specs: Sequence[PolicySpec]) -> None:
    """ConfigError unless all produce the same actions."""
    first = specs[0].action
    for label, spec in zip(labels, specs, strict=True):
        for field in ArraySpec.__struct_fields__:
            ours, theirs = getattr(first, field), getattr(spec.action, field)
            if ours != theirs:
                raise ConfigError(
                    f"the actions of '{labels[0]}' and '{label}' differ in {field}: {ours} and "
                    f"{theirs}; policies that are composed must act on the same robot"
                )


def construct_all(members: Sequence[Member]) -> list[Any]:
    """The members with untrained weights; ConfigError names the one that cannot be made."""
    from policies.checkpoint import construct

    labels = [member.label for member in members]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"members are labelled {labels}; labels must differ")
    made: list[Any] = []
    for member in members:
        try:
            made.append(construct(member.policy))
        except ConfigError as error:
            raise ConfigError(f"policy '{member.label}': {error}") from error
    return made


def own_part(label: str, own: PolicySpec, union: PolicySpec, source: Mapping[str, Any]) -> Any:
    """A member's keys, and its newest steps of them, out of what the composition is given.

    SpecError that names the member if a key is missing or its history is not the composition's.
    """
    found: dict[str, Any] = {}
    for key in own.observation:
        if key not in source:
            raise SpecError(
                f"policy '{label}' needs '{key}', which is missing; got keys {sorted(source)}"
            )
        value = source[key]
        if value.ndim < 2 or value.shape[1] != union.n_obs_steps:
            raise SpecError(
                f"{key} has shape {tuple(value.shape)}; this composition needs a history of "
                f"{union.n_obs_steps} steps on its second axis"
            )
        found[key] = value[:, -own.n_obs_steps :]
    return found


def later(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch has of later observations, which world models learn to predict."""
    return {key: batch[key] for key in batch if key.startswith((FUTURE, FUTURE_IS_PAD))}
