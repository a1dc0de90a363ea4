"""One request for a decision as named arrays, and its check before any work is done for it.

Shapes: B rows, To history, H chunk, D action, d committed actions.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import Carry
from embodied.core.specs import ArraySpec, PolicySpec

MAX_CARRY_BYTES = 1 << 22
"""Of what one row remembers: it travels with every request and back."""

_OBS, _CARRY = "obs/", "carry/"


@dataclass(frozen=True, slots=True)
class Request:
    """A decision for B rows. prefix: None without committed actions. carry: None if the policy
    remembers nothing."""

    obs: dict[str, np.ndarray]
    seed: np.ndarray
    carry: Carry | None = None
    prefix: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.seed)

    @property
    def committed(self) -> int:
        """d: requests of one batch have the same."""
        return 0 if self.prefix is None else self.prefix.shape[1]


@dataclass(frozen=True, slots=True)
class Form:
    """What requests to one policy look like. fresh: what one row remembers before its first
    decision, None if nothing ever. max_rows: of one request."""

    spec: PolicySpec
    fresh: Carry | None
    max_rows: int

    def __post_init__(self) -> None:
        """Raise ConfigError for a policy that remembers too much to be asked from afar."""
        size = sum(value.nbytes for value in (self.fresh or {}).values())
        if size > MAX_CARRY_BYTES:
            raise ConfigError(
                f"the policy remembers {size} bytes a row; at most {MAX_CARRY_BYTES} travel with "
                "each request: let it act where its robots are"
            )

    def fingerprint(self) -> str:
        """Tells this policy's requests from those of another one; 32 hex digits."""
        carry = {key: (value.shape, value.dtype.str) for key, value in (self.fresh or {}).items()}
        data = msgspec.msgpack.encode((self.spec, carry), order="deterministic")
        return hashlib.sha256(data).hexdigest()[:32]

    def read(self, arrays: Mapping[str, np.ndarray]) -> Request:
        """The request; SpecError unless its arrays are exactly those that the policy needs, in
        shape, dtype and number of rows, and finite."""
        prefixed = {"prefix"} if "prefix" in arrays else set[str]()
        carried = {f"{_CARRY}{key}" for key in self.fresh or ()}
        observed = {f"{_OBS}{key}" for key in self.spec.observation}
        wanted = observed | carried | prefixed | {"seed"}
        if arrays.keys() != wanted:
            odd = sorted(arrays.keys() ^ wanted)
            raise SpecError(
                f"arrays missing or not the policy's: {', '.join(odd[:4])}; it reads "
                f"{', '.join(sorted(wanted))}"
            )
        seed = arrays["seed"]
        if seed.ndim != 1 or seed.dtype != np.int64 or not 1 <= len(seed) <= self.max_rows:
            raise SpecError(
                f"seed is {seed.dtype} {seed.shape}; it must be int64 [B], with B in "
                f"1..{self.max_rows}"
            )
        for key, array in self.spec.observation.items():
            shape = (len(seed), self.spec.n_obs_steps, *array.shape)
            _check(arrays, f"{_OBS}{key}", shape, array.dtype)
        for key, fresh in (self.fresh or {}).items():
            _check(arrays, f"{_CARRY}{key}", (len(seed), *fresh.shape[1:]), str(fresh.dtype))
        if prefixed:
            self._check_prefix(arrays, len(seed))
        carry = {key: arrays[f"{_CARRY}{key}"] for key in self.fresh or ()}
        return Request(
            {key: arrays[f"{_OBS}{key}"] for key in self.spec.observation},
            seed,
            None if self.fresh is None else carry,
            arrays.get("prefix"),
        )

    def _check_prefix(self, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        prefix = arrays["prefix"]
        most = self.spec.horizon - self.spec.n_action_steps
        committed = prefix.shape[1] if prefix.ndim == 3 else 0
        if not 1 <= committed <= most:
            raise SpecError(
                f"prefix has shape {prefix.shape}; it must be [B, d, {self.spec.action.size}] with "
                f"d in 1..{most}, H − s"
            )
        _check(arrays, "prefix", (rows, committed, self.spec.action.size), "float32")

    def check_answer(
        self, arrays: Mapping[str, np.ndarray], rows: int
    ) -> tuple[Carry | None, np.ndarray]:
        """Carry and actions [B, H, D] of an answer; SpecError if it is not one to B rows."""
        _check(arrays, "actions", (rows, self.spec.horizon, self.spec.action.size), "float32")
        for key, fresh in (self.fresh or {}).items():
            _check(arrays, f"{_CARRY}{key}", (rows, *fresh.shape[1:]), str(fresh.dtype))
        carry = {key: arrays[f"{_CARRY}{key}"] for key in self.fresh or ()}
        return None if self.fresh is None else carry, arrays["actions"]


def request_arrays(request: Request) -> dict[str, np.ndarray]:
    """A request's arrays by name."""
    arrays = {f"{_OBS}{key}": value for key, value in request.obs.items()}
    arrays |= {"seed": request.seed, **carry_arrays(request.carry)}
    return arrays if request.prefix is None else {**arrays, "prefix": request.prefix}


def carry_arrays(carry: Carry | None) -> dict[str, np.ndarray]:
    """What is remembered, by name of its arrays in a message."""
    return {f"{_CARRY}{key}": value for key, value in (carry or {}).items()}


def read_fresh(arrays: Mapping[str, np.ndarray]) -> Carry | None:
    """What one row remembers before its first decision, as Described brings it.

    SpecError for arrays that are no such thing.
    """
    for name, value in arrays.items():
        if not name.startswith(_CARRY) or value.shape[:1] != (1,):
            raise SpecError(f"'{name}' {value.shape} is nothing that one row remembers")
    return {name.removeprefix(_CARRY): value for name, value in arrays.items()} or None


def _check(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: str) -> None:
    if name not in arrays:
        raise SpecError(f"'{name}' is missing; got {', '.join(sorted(arrays))}")
    value = ArraySpec(shape, dtype).check(arrays[name], name)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise SpecError(f"{name} holds values that are not finite")
