"""Where may be listened and dialled: without certificates, inside this host only."""

import ipaddress
import re
import socket

from embodied.core.errors import ConfigError

_ADDRESS = re.compile(r"(?:\[([0-9A-Za-z:.%]+)\]|([^\[\]:/]+)):([0-9]{1,5})")
_HOST_NAME = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?"
)
_ALL_INTERFACES = ("0.0.0.0", "::")
_ISSUE = "make one with `embodied pki issue` and name its folder"


def check_listen(address: str, has_identity: bool) -> str:
    """Return an address that a gRPC server may listen on; raise ConfigError with the fix if not.

    address: `host:port` (`127.0.0.1:0`, `[::1]:50051`) or `unix:/path`. has_identity: whether a
    certificate is at hand; without one only this host itself may connect. All interfaces are
    listened on only where `0.0.0.0` or `[::]` is spelled out.
    """
    host = _host_of(address)
    if host is None:
        return address
    literal = _literal(host)
    if literal is not None and literal.is_unspecified and host not in _ALL_INTERFACES:
        raise ConfigError(f"address '{address}': write all interfaces as 0.0.0.0 or [::]")
    if not has_identity and not _is_loopback(host):
        raise ConfigError(
            f"without a certificate nothing listens on '{address}', where other hosts can connect; "
            f"{_ISSUE}, or listen on 127.0.0.1"
        )
    return address


def check_dial(address: str, has_identity: bool) -> str:
    """Return an address that may be dialled; raise ConfigError if it is another host's and there
    is no certificate, as that connection would not be encrypted. Addresses as in `check_listen`."""
    host = _host_of(address)
    if host is None:
        return address
    literal = _literal(host)
    if literal is not None and literal.is_unspecified:
        raise ConfigError(f"address '{address}' names no host; dial a gateway's name or address")
    if not has_identity and not _is_loopback(host):
        raise ConfigError(
            f"without a certificate '{address}' is not dialled, as the connection would not be "
            f"encrypted; {_ISSUE}"
        )
    return address


def _host_of(address: str) -> str | None:
    """The host part; None for a Unix socket."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise ConfigError(f"address '{address}' needs an absolute path: unix:/path")
        return None
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(
            f"address '{address}' is not HOST:PORT, [IPv6]:PORT or unix:/path; to listen on all "
            "interfaces write 0.0.0.0:PORT"
        )
    host = match[1] or match[2]
    literal = _literal(host)
    if (literal is not None and literal.version == 6) != (match[1] is not None) or (
        literal is None and not _HOST_NAME.fullmatch(host)
    ):
        raise ConfigError(f"address '{address}': '{host}' is not a host's name or IP address")
    return host


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    """Whether the host is this one, whoever is asked: of names, only a sane `localhost` is."""
    literal = _literal(host)
    if literal is not None:
        return literal.is_loopback
    if host.lower() != "localhost":
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    resolved = [_literal(str(entry[4][0])) for entry in found]
    return all(address is not None and address.is_loopback for address in resolved)
