"""Who gets a session at a run's gateway over mutual TLS, and for how long."""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from certificates import Hosts, long_ago
from linking import RawHost, wait_for
from sites import RUN, run_gateway

from embodied.comms.identity.credentials import load_bundle, server_credentials
from embodied.comms.links import link_pb2 as pb
from embodied.comms.links.client import Link
from embodied.comms.links.server import LinkServer
from embodied.comms.links.wire import Hello
from embodied.core.errors import LinkError
from embodied.run.site import messages as m

WITHIN_S = 12.0
"""By when a session has to end after its certificate did: several checks, on a busy machine."""


def ahead():
    return datetime.now(UTC) + timedelta(days=1)


def seconds(number):
    return timedelta(seconds=number)


def raw(folder, key_of=None, authority_of=None):
    """Credentials of a folder without our checks, as an attacker would make them."""
    return grpc.ssl_channel_credentials(
        ((authority_of or folder) / "ca.pem").read_bytes(),
        ((key_of or folder) / "key.pem").read_bytes(),
        (folder / "certificate.pem").read_bytes(),
    )


class Lab:
    """Hosts of our authority and of another one, and the gateway of run-1."""

    def __init__(self, folder: Path) -> None:
        for name in ("ours", "foreign"):
            (folder / name).mkdir()
        self.hosts, self.foreign = Hosts(folder / "ours"), Hosts(folder / "foreign")
        self.hub = self.hosts.gateway()
        self.honest = self.hosts.robot("honest")
        self.address = ""

    def dial(self, folder, name, run=""):
        return Link(self.address, Hello(name, run, ""), lambda: load_bundle(folder))

    def serves(self):
        with self.dial(self.honest, "honest", RUN) as link:
            joined, _ = link.requests("control", m.REPLIES).request(m.Join(), {}, 20)
        return isinstance(joined, m.Assignment) and joined.name == RUN


@pytest.fixture(scope="module")
def lab():
    with tempfile.TemporaryDirectory() as folder:
        made = Lab(Path(folder))
        with run_gateway(Path(folder), made.hub) as gateway:
            made.address = gateway.address
            yield made


def revoked(lab):
    folder = lab.hosts.robot("revoked")
    lab.hosts.revoke("revoked", lab.hub)
    return raw(folder)


HANDSHAKE: dict[str, Callable[[Lab], grpc.ChannelCredentials | None]] = {
    "no encryption": lambda lab: None,
    "no certificate": lambda lab: grpc.ssl_channel_credentials(
        (lab.honest / "ca.pem").read_bytes()
    ),
    "expired": lambda lab: raw(lab.hosts.robot("expired", starts=long_ago())),
    "not yet valid": lambda lab: raw(lab.hosts.robot("early", starts=ahead())),
    "of another authority": lambda lab: raw(lab.foreign.robot("fake"), authority_of=lab.honest),
    "of another key": lambda lab: raw(lab.honest, key_of=lab.hosts.robot("other")),
    "of a gateway": lambda lab: raw(lab.hosts.gateway("hub-2")),
}
"""What does not get through the handshake."""

ADMISSION: dict[str, tuple[Callable[[Lab], grpc.ChannelCredentials], Hello, str]] = {
    "of another robot": (
        lambda lab: raw(lab.honest),
        Hello("victim", "", ""),
        "the certificate is of host 'honest', which calls itself 'victim'",
    ),
    "for other runs": (
        lambda lab: raw(lab.hosts.robot("pusher", runs=["push-*"])),
        Hello("pusher", "", ""),
        "may not take part in run 'run-1'; its certificate permits push-*",
    ),
    "revoked": (revoked, Hello("revoked", "", ""), "is revoked"),
    "for a run that is not here": (
        lambda lab: raw(lab.honest),
        Hello("honest", "run-2", ""),
        "here is run 'run-1', not 'run-2'",
    ),
}
"""What gets through it and is refused with a reason: credentials, greeting, reason."""


@pytest.mark.parametrize("what", HANDSHAKE)
def test_without_a_right_certificate_there_is_no_handshake(lab, what):
    with RawHost(lab.address, HANDSHAKE[what](lab)) as host:
        with pytest.raises(grpc.RpcError) as refused:
            host.hello(Hello("honest", "", ""))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert lab.serves()


@pytest.mark.parametrize("what", ADMISSION)
def test_who_may_not_take_part_is_told_why(lab, what):
    credentials, hello, why = ADMISSION[what]
    with RawHost(lab.address, credentials(lab)) as host:
        welcome = host.hello(hello)
        assert welcome.version == 0 and why in welcome.refusal
        assert list(host.call) == []
    assert lab.serves()


def test_a_host_talks_to_no_gateway_of_another_authority(lab):
    foreign = load_bundle(lab.foreign.gateway("fake-hub"))
    credentials = server_credentials(lambda: foreign)
    with LinkServer("127.0.0.1:0", {}, credentials, lambda *_: None) as fake:
        with Link(fake.address, Hello("honest", "", ""), lambda: load_bundle(lab.honest)) as link:
            wait_for(lambda: "unavailable" in link.status().reason)
            with pytest.raises(LinkError):
                link.requests("control", m.REPLIES).request(m.Join(), {}, 0.3)
        assert not fake.peers()


def ends_with(host, why):
    """Answer the gateway's pings until it says goodbye, as one who means to stay does."""
    for piece in map(pb.Piece.FromString, host.call):
        if piece.WhichOneof("body") == "goodbye":
            assert why in piece.goodbye.reason
            return
        if piece.WhichOneof("body") == "ping":
            pong = pb.Piece(pong=pb.Pong(nonce=piece.ping.nonce))
            host.send(pong.SerializeToString())
    raise AssertionError("the session ended without a goodbye")


def test_the_gateway_ends_the_session_of_who_is_revoked_or_has_expired(lab):
    """Neither of these hosts ends it by itself."""
    short = raw(lab.hosts.robot("short", lifetime=seconds(3)))
    stolen = raw(lab.hosts.robot("stolen"))
    with (
        RawHost(lab.address, stolen) as thief,
        RawHost(lab.address, short) as outlived,
        lab.dial(lab.honest, "honest") as link,
    ):
        assert thief.hello(Hello("stolen", "", "")).version == 1
        assert outlived.hello(Hello("short", "", "")).version == 1
        assert link.wait(10)
        lab.hosts.revoke("stolen", lab.hub)
        begun = datetime.now(UTC)
        ends_with(thief, "of robot 'stolen' is revoked")
        ends_with(outlived, "of robot 'short' expired")
        assert datetime.now(UTC) - begun < seconds(3 + WITHIN_S)
        status = link.status()
        assert status.connected and not status.reconnects
    assert lab.serves()


def test_a_list_of_revocations_that_is_being_copied_ends_no_session(lab):
    path = lab.hub / "revoked.crl"
    whole = path.read_bytes()
    with lab.dial(lab.honest, "honest") as link:
        assert link.wait(10)
        path.write_bytes(whole[: len(whole) // 2])
        with RawHost(lab.address, raw(lab.hosts.robot("late"))) as late:
            refusal = late.hello(Hello("late", "", "")).refusal
        path.write_bytes(whole)
        assert "not a revocation list" in refusal
        status = link.status()
        assert status.connected and not status.reconnects


def test_a_host_ends_its_own_session_and_comes_back_with_a_new_certificate(lab):
    """Here the gateway does not look at dates."""
    folder = lab.hosts.robot("renewed", lifetime=seconds(2))
    services = server_credentials(lambda: load_bundle(lab.hub))
    with (
        LinkServer("127.0.0.1:0", {}, services, lambda *_: None) as server,
        Link(server.address, Hello("renewed", "", ""), lambda: load_bundle(folder)) as link,
    ):
        assert link.wait(10)
        wait_for(lambda: not link.status().connected, 2 + WITHIN_S)
        wait_for(lambda: "expired on" in link.status().reason)
        wait_for(lambda: not server.peers())
        lab.hosts.robot("renewed", output=folder)
        assert link.wait(10) and link.status().reason == ""


@pytest.mark.slow
def test_a_gateway_ends_all_sessions_when_its_own_certificate_ends(lab, tmp_path):
    hub = lab.hosts.gateway("short-hub", lifetime=seconds(4))
    with run_gateway(tmp_path, hub) as gateway, RawHost(gateway.address, raw(lab.honest)) as host:
        assert host.hello(Hello("honest", "", "")).version == 1
        ends_with(host, "of gateway 'short-hub'")


@pytest.mark.slow
def test_a_gateway_with_a_new_certificate_keeps_its_sessions_and_takes_in_others(lab, tmp_path):
    ends = datetime.now(UTC) + seconds(4)
    hub = lab.hosts.gateway("short-hub", lifetime=seconds(4))
    with run_gateway(tmp_path, hub) as gateway:

        def dial(folder, name):
            return Link(gateway.address, Hello(name, "", ""), lambda: load_bundle(folder))

        with dial(lab.honest, "honest") as link:
            assert link.wait(10)
            lab.hosts.gateway("short-hub", output=hub)
            wait_for(lambda: datetime.now(UTC) > ends + seconds(2.5))
            assert link.status().connected and not link.status().reconnects
            with dial(lab.hosts.robot("late"), "late") as late:
                assert late.wait(10)
