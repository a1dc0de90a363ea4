"""What drivers and policies must provide. Shapes: B batch, To history, H chunk, D action."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from embodied.core.frames import Observation
from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec

Carry = dict[str, np.ndarray]
"""What a policy remembers from one decision to the next; the first axis of each is the batch."""

Parameterisation = Literal["epsilon", "sample", "v", "flow"]


class Driver(Protocol):
    """What a robot's author writes: one tick, one thread, no safety, no clock, no queue."""

    spec: DeviceSpec

    def open(self) -> None:
        """Connect. Called once before anything else."""
        ...

    def sense(self) -> Observation:
        """Read every declared observation."""
        ...

    def drive(self, action_D: np.ndarray) -> None:
        """Command one tick's action; it is finite and within the spec's bounds."""
        ...

    def hold(self) -> None:
        """Command standing still: the measured position becomes the goal, and stays it."""
        ...

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        ...


@runtime_checkable
class SimulatedDriver(Driver, Protocol):
    """A driver whose time is stepped, and whose state can be set and read."""

    def step_time(self) -> None:
        """Advance the simulation by one tick under the last command."""
        ...

    def reset(self, seed: int) -> None:
        """Go to the start state of `seed`: the same seed gives the same state, bit for bit."""
        ...

    def signals(self) -> dict[str, float]:
        """Privileged scalars of the present state, as declared in the spec."""
        ...


@runtime_checkable
class Renders(Protocol):
    """A driver that can draw itself for a video."""

    def render(self, width: int, height: int) -> np.ndarray:
        """Picture [height, width, 3], uint8."""
        ...


@runtime_checkable
class Snapshots(Protocol):
    """A driver that can be drawn while it goes on: drawing takes longer than a servo step."""

    def snapshot(self, width: int, height: int) -> Callable[[], np.ndarray]:
        """Keep what is to be seen now; what is returned draws it later, [height, width, 3],
        uint8, without the driver. Always call that from the same thread."""
        ...


@dataclass(frozen=True, slots=True)
class Condition:
    """How a robot is: hottest part (°C), greatest load (share of the rated one), supply (V).

    retries: reads repeated since open because an answer was missing. fault: what the robot itself
    reports (overload, over-temperature), "" if nothing; it latches the halt.
    """

    temperature_c: float | None = None
    load: float | None = None
    voltage_v: float | None = None
    retries: int = 0
    fault: str = ""


@runtime_checkable
class Monitored(Protocol):
    """A driver that knows its condition from what `sense` has read: no I/O of its own."""

    def condition(self) -> Condition:
        """Newest condition."""
        ...


class Camera(Protocol):
    """One camera, read by a thread of its own at its own rate."""

    spec: ArraySpec

    def open(self) -> None:
        """Connect; raises with the reason if there is no picture."""
        ...

    def read(self) -> np.ndarray:
        """Wait for the next picture [height, width, 3], uint8, RGB."""
        ...

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        ...


Event = Literal["success", "failure", "rerecord", "stop", "estop"]


class Teleoperator(Protocol):
    """A person's hands: a keyboard, a gamepad, a leader arm, or a script in their place."""

    def open(self) -> None:
        """Connect."""
        ...

    def read(self, observation: Observation) -> np.ndarray | None:
        """Action [D] for the coming tick; None while the person does not take part."""
        ...

    def events(self) -> list[Event]:
        """What the person has signalled since the last call, oldest first."""
        ...

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        ...


class Operator(Protocol):
    """The person beside the robot."""

    def ask(self, text: str) -> None:
        """Say what to do and return when it is done."""
        ...

    def events(self) -> list[Event]:
        """What was signalled since the last call."""
        ...


class Policy(Protocol):
    """Maps observation histories to chunks of actions."""

    spec: PolicySpec

    def init(self, batch: int) -> Carry | None:
        """What `batch` rows remember before their first decision; None if nothing ever."""
        ...

    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """Decide. obs: [B, To, ...] in device units; prefix: committed actions [B, d, D];
        seed: [B], one for each row, so that a row's noise does not depend on its neighbours.
        carry: from the decision n_action_steps ticks ago, whose actions have been executed since;
        rows for which that does not hold begin anew with `init`.
        Returns the carry and actions [B, H, D] in device units, float32."""
        ...

    def sample(self, obs: Any, n: int, *, seed: int) -> Any:
        """Draw n chunks per row: tensor [B, n, H, D] in device units."""
        ...

    def loss(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Cloning loss (scalar tensor) and metrics."""
        ...


@runtime_checkable
class Distant(Protocol):
    """A policy that decides elsewhere. Its `act` raises NoActionError if no decision came in time.

    version: of the policy that made the last decision.
    """

    version: int

    def allow(self, committed_s: float, useful_s: float) -> None:
        """Time of the next decision, on a robot whose time does not wait: how long committed
        actions still play, and after how long an answer would be of no use."""
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """A denoiser's output [B, H, D] and what it stands for."""

    value: Any
    parameterisation: Parameterisation


@runtime_checkable
class Composite(Protocol):
    """A policy that is made of others."""

    def parts(self) -> Mapping[str, Policy]:
        """Those that are in use, by label."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """What score-level composition and guidance need."""

    def encode(self, obs: Any) -> Any:
        """Conditioning, computed once per decision."""
        ...

    def denoise(self, x_t: Any, log_snr: Any, cond: Any) -> Prediction:
        """Prediction at x_t = √ᾱ x₀ + √(1−ᾱ) ε, where log_snr = log(ᾱ / (1−ᾱ)): [B], or a float
        for all rows."""
        ...


@runtime_checkable
class WorldModel(Protocol):
    """Every mode of a joint model over one network."""

    spec: PolicySpec

    @property
    def predicted_keys(self) -> tuple[str, ...]:
        """Observation keys that it predicts."""
        ...

    @property
    def predicted_ticks(self) -> tuple[int, ...]:
        """How many ticks after the newest observation each of the S predicted ones is, ascending;
        the first lies in 1..horizon."""
        ...

    def infer(
        self,
        obs: Any,
        *,
        actions: Any = None,
        next_obs: Any = None,
        want: set[str],
        seed: np.ndarray,
    ) -> dict[str, Any]:
        """Sample the wanted ones of "actions" and "next_obs" given what is given of them; what is
        neither is left open. seed: as of Policy.act."""
        ...


@runtime_checkable
class Critic(Protocol):
    """Values of chunks."""

    def q(self, obs: Any, actions: Any) -> Any:
        """Ensemble statistics for actions [B, n, H, D]: [B, n]."""
        ...
