"""Options of a run's gateway, the one door through which robots of other hosts come in."""

from typing import Annotated, Literal

import msgspec

from embodied.comms.identity.binding import check_listen
from embodied.core.errors import ConfigError

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Robots of other hosts, which dial in (embodied site).

    listen: HOST:PORT, null for no gateway. identity: this site's folder of `embodied pki issue`;
    null only on loopback. precision: of the weights that travel; bfloat16 is half of it and rounds
    once. serve: whether the gateway's site computes chunks for hosts that ask. mbit_s: what one
    link may use, null for all there is. metrics_port: of this host's loopback, for Prometheus; null
    for none.
    """

    listen: str | None
    identity: str | None
    precision: Literal["float32", "bfloat16"]
    serve: bool
    mbit_s: float | None
    metrics_port: _Port | None

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        if self.listen is None and (self.identity or self.serve):
            raise ConfigError("gateway.identity and gateway.serve need gateway.listen=HOST:PORT")
        if self.mbit_s is not None and not self.mbit_s > 0:
            raise ConfigError(f"gateway.mbit_s is {self.mbit_s}; it must be positive or null")

    def check(self, mode: str, collects: bool, actors: int, expert: bool) -> None:
        """Raise ConfigError for a run that robots elsewhere cannot work for, or one without robots.

        collects: whether its algorithm learns from what robots do. actors: processes here. expert:
        whether they are to demonstrate.
        """
        if actors == 0 and (self.listen is None or expert):
            raise ConfigError(
                "actors.count is 0: only a run with gateway.listen and demonstrations from a data "
                "set has all its robots elsewhere"
            )
        if self.listen is None:
            return
        if mode == "lockstep":
            raise ConfigError("run.mode=lockstep repeats bit for bit; robots of other hosts do not")
        if not collects:
            raise ConfigError(
                "gateway.listen is for algorithms that learn from what robots do; this one does not"
            )
        check_listen(self.listen, self.identity is not None)
