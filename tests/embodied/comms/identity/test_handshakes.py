"""Real handshakes of gRPC over loopback: who gets in, who does not."""

import contextlib
import socket
import ssl
import subprocess
import sys
from concurrent import futures
from types import SimpleNamespace

import grpc
import pytest
from certificates import Hosts, long_ago

from embodied.comms.identity.credentials import (
    channel_credentials,
    load_bundle,
    server_credentials,
)
from embodied.comms.identity.peer import certificate_in, check_peer
from embodied.core.errors import IdentityError


class _Echo(grpc.GenericRpcHandler):
    """Answers a run's name by the robot's, if that may take part in it."""

    def __init__(self, revocations=None):
        self.revocations = revocations
        self.contexts = []

    def service(self, _):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, request, context):
        if self.revocations is None:
            return b"plain"
        self.contexts.append(dict(context.auth_context()))
        try:
            pem = certificate_in(context.auth_context())
            return check_peer(pem, self.revocations, request.decode()).name.encode()
        except IdentityError as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))


@contextlib.contextmanager
def _serving(credentials, revocations=None):
    echo = _Echo(revocations)
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[echo])
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield SimpleNamespace(port=port, echo=echo)
    finally:
        server.stop(None).wait(5)


def _ask(port, credentials, run="reach-1"):
    """(status, answer or details) of one call."""
    address = f"127.0.0.1:{port}"
    channel = (
        grpc.insecure_channel(address)
        if credentials is None
        else grpc.secure_channel(address, credentials)
    )
    with channel:
        try:
            return grpc.StatusCode.OK, channel.unary_unary("/echo/echo")(run.encode(), timeout=10)
        except grpc.RpcError as error:
            return error.code(), error.details()


def _raw(folder, key_of=None):
    """Credentials of a folder without our checks, as an attacker would make them."""
    return grpc.ssl_channel_credentials(
        (folder / "ca.pem").read_bytes(),
        ((key_of or folder) / "key.pem").read_bytes(),
        (folder / "certificate.pem").read_bytes(),
    )


def _raw_server(folder):
    pair = ((folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes())
    return grpc.ssl_server_credentials([pair])


@pytest.fixture
def hosts(tmp_path):
    return Hosts(tmp_path)


@pytest.fixture
def gateway(hosts):
    bundle = load_bundle(hosts.gateway())
    with _serving(server_credentials(lambda: bundle), bundle.revocations()) as serving:
        serving.folder = bundle.folder
        yield serving


def test_a_robot_gets_into_its_runs_and_no_other(hosts, gateway):
    mine = channel_credentials(load_bundle(hosts.robot(runs=["reach-*", "push"])))
    for run in ("reach-1", "reach-", "push"):
        assert _ask(gateway.port, mine, run) == (grpc.StatusCode.OK, b"arm-1")
    for run in ("push-2", "pus", "REACH-1", "", "*"):
        status, said = _ask(gateway.port, mine, run)
        assert status == grpc.StatusCode.PERMISSION_DENIED and "reach-*, push" in said
    assert gateway.echo.contexts[0]["ssl_tls_version"] == [b"TLSv1.3"]


def test_a_robot_that_is_revoked_while_the_gateway_runs_gets_in_no_more(hosts, gateway):
    one = channel_credentials(load_bundle(hosts.robot("arm-1")))
    other = channel_credentials(load_bundle(hosts.robot("arm-2")))
    assert _ask(gateway.port, one)[0] == grpc.StatusCode.OK
    hosts.revoke("arm-1", gateway.folder)
    status, said = _ask(gateway.port, one)
    assert status == grpc.StatusCode.PERMISSION_DENIED and "revoked" in said
    assert _ask(gateway.port, other) == (grpc.StatusCode.OK, b"arm-2")
    (gateway.folder / "revoked.crl").unlink()
    assert "nobody is admitted" in _ask(gateway.port, other)[1], "without the list it fails open"


def test_who_has_no_right_certificate_does_not_get_through_the_handshake(hosts, gateway, tmp_path):
    foreign = Hosts(tmp_path / "foreign")
    robot = hosts.robot()
    mixed = foreign.robot("arm-1")
    (mixed / "ca.pem").write_bytes((robot / "ca.pem").read_bytes())  # so that it trusts the gateway
    attackers = {
        "plain": None,
        "no certificate": grpc.ssl_channel_credentials((robot / "ca.pem").read_bytes()),
        "expired": _raw(hosts.robot("arm-2", starts=long_ago())),
        "of another authority": _raw(mixed),
        "a gateway's": _raw(hosts.gateway("hub-2")),
        "another's key": _raw(robot, key_of=hosts.robot("arm-3")),
    }
    for kind, credentials in attackers.items():
        assert _ask(gateway.port, credentials)[0] == grpc.StatusCode.UNAVAILABLE, kind
    assert not gateway.echo.contexts, "a handler ran for one that was refused"


def test_a_robot_talks_to_no_gateway_but_its_own(hosts, tmp_path):
    foreign = Hosts(tmp_path / "foreign")
    mine = channel_credentials(load_bundle(hosts.robot()))
    impostors = {
        "plain": None,
        "of another authority": _raw_server(foreign.gateway()),
        "expired": _raw_server(hosts.gateway("hub-2", starts=long_ago())),
        "a robot's": _raw_server(hosts.robot("arm-2")),
        "of another address": _raw_server(hosts.gateway("hub-3", ip=["127.0.0.2"])),
    }
    for kind, credentials in impostors.items():
        with _serving(credentials) as serving:
            assert _ask(serving.port, mine)[0] == grpc.StatusCode.UNAVAILABLE, kind


def test_a_renewed_certificate_works_beside_the_old_one(hosts, gateway):
    folder = hosts.robot()
    old = load_bundle(folder)
    new = load_bundle(hosts.robot(output=folder))
    assert old.certificate_pem != new.certificate_pem
    for bundle in (old, new):
        assert _ask(gateway.port, channel_credentials(bundle))[0] == grpc.StatusCode.OK


@pytest.mark.parametrize("version", [b"TLSv1.2", b"", None])
def test_a_session_that_is_not_tls_13_is_refused(hosts, gateway, version):
    assert _ask(gateway.port, channel_credentials(load_bundle(hosts.robot())))[1] == b"arm-1"
    context = dict(gateway.echo.contexts[0])
    certificate_in(context)
    context["ssl_tls_version"] = [] if version is None else [version]
    with pytest.raises(IdentityError, match=r"TLS 1\.3"):
        certificate_in(context)


_SERVER = """
import sys
from concurrent import futures
from pathlib import Path
from embodied.cli.main import main
assert main(["pki", "list", sys.argv[1]]) == 0
import grpc
from embodied.comms.identity.credentials import load_bundle, server_credentials
server = grpc.server(futures.ThreadPoolExecutor(1))
port = server.add_secure_port(
    "127.0.0.1:0", server_credentials(lambda: load_bundle(Path(sys.argv[2])))
)
server.start()
sys.stdout.write(f"port {port}\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_the_command_line_leaves_grpc_no_tls_12(hosts):
    folder, robot = hosts.gateway(), hosts.robot()
    command = [sys.executable, "-c", _SERVER, str(hosts.authority.folder), str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = next(int(line.split()[1]) for line in server.stdout if line.startswith("port "))
        for version, works in ((ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, False)):
            context = ssl.create_default_context(cafile=robot / "ca.pem")
            context.load_cert_chain(robot / "certificate.pem", robot / "key.pem")
            context.minimum_version = context.maximum_version = version
            context.set_alpn_protocols(["h2"])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
                if works:
                    with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                        assert secure.recv(9), "no settings of HTTP/2"
                else:
                    with pytest.raises(OSError):
                        context.wrap_socket(plain, server_hostname="127.0.0.1")
    finally:
        server.kill()
        server.communicate(timeout=10)
