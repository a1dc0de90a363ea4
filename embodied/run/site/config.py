"""Options of a robot host that works for a run elsewhere, and what its roles know."""

from typing import Literal

import msgspec

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.files import write_atomic
from embodied.core.rundir import RunDir
from embodied.run.actors_options import ActorsConfig
from embodied.weights.staleness import StalenessBound
from policies.acting import InferenceConfig

_SITE = "site.json"


class SpoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Steps on their way to the learner. max_gib: bytes on disk beyond which acknowledged ones are
    deleted; what is not acknowledged always stays. mbit_s: what they may use of the link, null for
    all of it."""

    max_gib: float
    mbit_s: float | None

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot be used."""
        if not self.max_gib > 0:
            raise ConfigError(f"spool.max_gib is {self.max_gib}; it must be positive")
        if self.mbit_s is not None and not self.mbit_s > 0:
            raise ConfigError(f"spool.mbit_s is {self.mbit_s}; it must be positive or null")


class SiteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A host that acts for a run elsewhere (embodied site).

    gateway: HOST:PORT of the run. identity: this host's folder of `embodied pki issue`; null only
    on loopback. name: of this host there; null takes the certificate's, or the machine's name.
    run: the run to work for; null takes whichever the gateway serves. root: where runs lie here,
    spool and weights included. actors, inference: in the place of the run's own. remote: where a
    policy computes: "never" here, "always" at the gateway's site, holding while the link is down;
    "prefer" at the gateway's site, and here while that does not answer. staleness: how old this
    host's weights may be when an episode begins. metrics_port: of this host's loopback, for
    Prometheus; null for none.
    """

    gateway: str
    identity: str | None
    name: str | None
    run: str | None
    root: str
    actors: ActorsConfig
    inference: InferenceConfig
    remote: Literal["never", "prefer", "always"]
    staleness: StalenessBound
    spool: SpoolConfig
    metrics_port: int | None

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        if self.remote == "always" and self.staleness.bounds:
            raise ConfigError(
                "staleness bounds this host's own weights, and remote=always uses none: it holds "
                "while the gateway's site does not answer. Leave its bounds null"
            )


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a host's roles know beside the run's configuration. run_id: of the Assignment."""

    name: str
    run: str
    run_id: str
    config: SiteConfig


def read_site(run: RunDir) -> Site | None:
    """The site that this is the run of; None where the learner is."""
    path = run.path / _SITE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Site)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise CorruptDataError(f"{path} is damaged: {error}") from error


def write_site(run: RunDir, site: Site) -> None:
    """Keep it in the run's folder for the roles."""
    write_atomic(run.path / _SITE, msgspec.json.encode(site))
