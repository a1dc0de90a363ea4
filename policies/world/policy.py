"""What every world model shares: how it denoises, and its view of later observations.

B batch, H chunk, D action, S later steps, N numbers of their tokens.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import Prediction
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec
from policies.base import GenerativePolicy
from policies.conversions import Scalar
from policies.networks.stages import Cond, evaluate
from policies.reading import Array, read
from policies.solvers.base import Solver
from policies.world.configs import WorldConfig
from policies.world.forms import FORMS, Form
from policies.world.latents import Latents
from policies.world.next_observation import NextObservation

ACTIONS, NEXT_OBS = "actions", "next_obs"
_WANTED = ({ACTIONS}, {NEXT_OBS}, {ACTIONS, NEXT_OBS})

Later = dict[str, torch.Tensor]

W = TypeVar("W", bound=WorldConfig)


class WorldPolicy(GenerativePolicy[W]):
    """A policy whose network predicts by a form (see Form), and which predicts observations."""

    next: NextObservation
    """What `make_next` made, which a subclass's `make_network` calls."""

    def __init__(self, spec: PolicySpec, config: W) -> None:
        """See GenerativePolicy."""
        super().__init__(spec, config)
        self.form: Form = FORMS[config.form](config)
        self.solver = self.make_solver()

    def make_next(self) -> NextObservation:
        """The later observations that the options name; these then say what their latents are."""
        keys = self.config.future_keys(self.spec.observation)
        make, options = component("latents", self.config.latents, "policy.latents")
        images = self.encoder.images
        sizes = {} if images is None else images.sizes
        shown = [key for key in keys if key in sizes]
        made: dict[tuple[int, int], Latents] = {}
        for size in dict.fromkeys(sizes[key] for key in shown):
            made[size] = make(options, size)
            found = msgspec.to_builtins(made[size].config)
            named = {"name": self.config.latents["name"], **found}
            self.config = msgspec.structs.replace(self.config, latents=named)
        latents = {key: made[sizes[key]] for key in shown}
        return NextObservation(self.spec, keys, len(self.config.future), latents)

    def _check_width(self, size: int, width: int, option: str) -> None:
        """ConfigError unless the noise of a token of so many numbers passes through the network,
        which predicts it: of P numbers all but the width would be lost, and samples be noise."""
        if size > width:
            raise ConfigError(
                f"a token of what is predicted has {size} numbers, and policy.{option}={width} "
                "lets no more pass than that: lower policy.latents.patch and raise its shrink, or "
                f"raise policy.{option}"
            )

    @property
    def predicted_keys(self) -> tuple[str, ...]:
        """See WorldModel."""
        return self.next.keys

    @property
    def predicted_ticks(self) -> tuple[int, ...]:
        """See WorldModel."""
        return self.config.future

    def make_solver(self, num_steps: int | None = None) -> Solver:
        """See GenerativePolicy."""
        return self.form.solver(num_steps)

    def time_of(self, log_snr: Scalar) -> Scalar:
        """See GenerativePolicy."""
        return self.form.time_of(log_snr)

    def denoise(self, x_t: torch.Tensor, log_snr: Scalar, cond: Cond) -> Prediction:
        """The chunk's prediction, at the form's time and scale, given what cond says."""
        x_BHD = self.form.scaled(x_t, log_snr)
        return Prediction(
            evaluate(self.network, x_BHD, self.time_of(log_snr), cond), self.form.kind
        )

    def _check_question(self, given: Mapping[str, object], want: set[str]) -> set[str]:
        """Which are given; SpecError unless something else is wanted, and training teaches it."""
        known = {name for name, value in given.items() if value is not None}
        if want not in _WANTED or want & known:
            raise SpecError(
                f"want is {sorted(want)}, given are {sorted(known)}; want actions, next_obs or "
                "both, and what is not given"
            )
        if untaught := self.config.untaught(known, want):
            raise SpecError(f"this world model never learned that: {untaught}")
        return known

    def _read_actions(self, actions: Array, rows: int) -> torch.Tensor:
        """Given chunks, normalised, [B, H, D]."""
        shape = (rows, self.spec.horizon, self.spec.action.size)
        chunk_BHD = read({ACTIONS: actions}, ACTIONS, shape, self.device)
        return finite(self._action.normalize(chunk_BHD), ACTIONS)

    def _read_next(self, next_obs: Mapping[str, Array], rows: int) -> torch.Tensor:
        """Given later observations [B, N]."""
        for key in next_obs:
            if key not in self.next.keys:
                raise SpecError(str(unknown("key of next_obs", key, self.next.keys)))
        later = self._read_later(next_obs, "", rows)
        views: Later = {}
        if self.encoder.images is not None:
            views = self.encoder.images.views(self._pictures(later), None)
        return finite(self._tokens(later, views, None), NEXT_OBS)

    def _read_later(self, source: Mapping[str, Array], prefix: str, rows: int) -> Later:
        """The later observations [B, S, …] in device units by key."""
        steps = len(self.config.future)
        found: Later = {}
        for key in self.next.keys:
            shape = (rows, steps, *self.spec.observation[key].shape)
            found[key] = read(source, prefix + key, shape, self.device)
            if key in self.next.cameras and found[key].dtype != torch.uint8:
                raise SpecError(f"{prefix}{key} is {found[key].dtype}; uint8 is right")
        return found

    def _pictures(self, later: Later) -> Later:
        return {key: later[key] for key in self.next.cameras}

    def _tokens(self, later: Later, views: Later, rng: torch.Generator | None) -> torch.Tensor:
        """[B, N]; views: of the pictures. rng: see Latents."""
        states = later.keys() - views.keys()
        normalised = {key: self.encoder.normalizer(key).normalize(later[key]) for key in states}
        return self.next.encode(normalised | views, rng)

    def _observations(self, next_BN: torch.Tensor) -> Later:
        """The next observation by key, in device units; pictures [B, S, h, w, 3] as seen."""
        found = self.next.decode(next_BN)
        for key, x in found.items():
            if key in self.next.cameras:
                found[key] = (255 * x).round().to(torch.uint8).movedim(2, -1)
            else:
                found[key] = self.encoder.normalizer(key).unnormalize(x)
        return found


def finite(x: torch.Tensor, what: str) -> torch.Tensor:
    """x; SpecError if a value of it is not finite."""
    if not torch.isfinite(x).all():
        raise SpecError(f"{what} holds values that are not finite")
    return x
