"""A robot host works for a run elsewhere: it joins, and runs its own crew of roles."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from embodied import __version__
from embodied.comms.identity.binding import check_dial
from embodied.comms.identity.credentials import Bundle, load_bundle
from embodied.comms.links.client import Link
from embodied.comms.links.wire import Hello
from embodied.core.config import convert
from embodied.core.errors import ConfigError, CorruptDataError, LinkError
from embodied.core.rundir import RunDir
from embodied.run.config import TrainConfig
from embodied.run.site import messages as m
from embodied.run.site.config import Site, SiteConfig, write_site
from embodied.run.site.freshness import forget_freshness
from embodied.run.supervisor import Crew, Supervisor
from embodied.run.tasks import check_robots
from embodied.run.telemetry import address

_ASK_S = 2.0
_WAIT_S = 0.5


def identity_of(config: SiteConfig) -> Bundle | None:
    """The host's certificate and keys, checked; None on loopback without."""
    bundle = None if config.identity is None else load_bundle(Path(config.identity))
    check_dial(config.gateway, bundle is not None)
    if bundle is not None:
        bundle.require("robot")
    return bundle


def dial(config: SiteConfig, name: str, run: str) -> Link:
    """This host's link to the gateway, which is made anew for as long as the object lives."""
    folder = config.identity
    return Link(
        config.gateway,
        Hello(name, run, __version__),
        None if folder is None else lambda: load_bundle(Path(folder)),
    )


def join(
    config: SiteConfig, keep_going: Callable[[], bool], waiting: Callable[[str], None]
) -> tuple[m.Assignment, str] | None:
    """Ask for the run until the gateway answers; None if told to stop before.

    Returns it with this host's name. waiting: told why there is no answer yet. ConfigError and
    IdentityError for what no waiting can mend on this side.
    """
    bundle = identity_of(config)
    name = config.name or (bundle.peer.name if bundle is not None else socket.gethostname())
    with dial(config, name, config.run or "") as link:
        control = link.requests("control", m.REPLIES)
        while keep_going():
            if not link.wait(_WAIT_S):
                waiting(f"{config.gateway}: {link.status().reason}")
                continue
            try:
                assignment, _ = control.request(m.Join(), {}, _ASK_S)
            except LinkError as error:
                waiting(str(error))
                continue
            if not isinstance(assignment, m.Assignment):
                raise ConfigError(f"{config.gateway} is no gateway of this release")
            return assignment, name
    return None


def run_site(
    config: SiteConfig,
    keep_going: Callable[[], bool],
    waiting: Callable[[str], None],
    joined: Callable[[RunDir, TrainConfig], None],
    notify: Callable[[dict[str, dict[str, Any]]], None],
) -> RunDir | None:
    """Join, then act until the run is over and everything is delivered.

    Returns the folder of the run here; None if it was told to stop before it had joined. joined:
    told of folder and configuration. Other arguments as of `join` and of Supervisor.
    """
    config.actors.check("async")
    found = join(config, keep_going, waiting)
    if found is None:
        return None
    assignment, name = found
    theirs = _config_of(assignment)
    check_robots(theirs.tasks, config.actors)
    run = RunDir(Path(config.root) / f"{assignment.name}-{assignment.id[:8]}")
    run.acquire()
    try:
        crew = site_crew(config)
        supervisor = Supervisor(run, crew, notify, keep_going)
        ours = _ours(theirs, config, supervisor.sockets)
        resumed = run.exists()
        run.write_config(ours)
        site = Site(name, assignment.name, assignment.id, config)
        write_site(run, site)
        forget_freshness(run)
        run.event("run resumed" if resumed else "run started", gateway=config.gateway, host=name)
        joined(run, ours)
        supervisor.run()
    finally:
        run.release()
    return run


def _config_of(assignment: m.Assignment) -> TrainConfig:
    try:
        raw = msgspec.json.decode(assignment.config, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptDataError(f"the gateway's configuration cannot be decoded: {error}") from error
    return convert(raw, TrainConfig)


def _ours(theirs: TrainConfig, config: SiteConfig, sockets: str) -> TrainConfig:
    """The run's configuration as this host needs it."""
    inference = config.inference
    if config.remote != "never":
        inference = msgspec.structs.replace(
            inference,
            remote=address(sockets, "inference"),
            fallback=config.remote == "prefer",
        )
    buffer = msgspec.structs.replace(theirs.buffer, max_gib=config.spool.max_gib)
    demonstrations = msgspec.structs.replace(theirs.demonstrations, source="none")
    gateway = msgspec.structs.replace(
        theirs.gateway, listen=None, identity=None, serve=False, metrics_port=None
    )
    return msgspec.structs.replace(
        theirs,
        actors=config.actors,
        inference=inference,
        buffer=buffer,
        demonstrations=demonstrations,
        gateway=gateway,
    )


def site_crew(config: SiteConfig) -> Crew:
    """The roles of a robot host."""
    actors = [f"actor{i}" for i in range(config.actors.count)]
    return Crew(
        roles=("buffer", "link", *actors),
        last=("link",),
        threads=lambda role: config.inference.threads if role.startswith("actor") else 1,
        terminal=config.actors.terminal,
    )
