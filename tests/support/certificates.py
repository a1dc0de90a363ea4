"""An authority, and hosts' folders issued by it."""

from datetime import UTC, datetime, timedelta

from embodied.comms.identity import keyfiles
from embodied.comms.identity.authority import Authority
from embodied.comms.identity.peer import Peer


class Hosts:
    """An authority in a folder and what it issues beside it."""

    def __init__(self, folder, name="lab"):
        self.folder = folder
        self.authority = Authority.create(folder / "authority", name)

    def gateway(self, name="hub", output=None, ip=("127.0.0.1",), **more):
        output = output or self.folder / name
        self.authority.issue(Peer("gateway", name), output, ip=ip, **more)
        return output

    def robot(self, name="arm-1", runs=("*",), output=None, **more):
        output = output or self.folder / name
        self.authority.issue(Peer("robot", name, tuple(runs)), output, **more)
        return output

    def revoke(self, which, gateway):
        """Revoke, and bring the gateway the new list."""
        self.authority.revoke(which)
        (gateway / keyfiles.REVOKED).write_bytes(
            (self.authority.folder / keyfiles.REVOKED).read_bytes()
        )


def long_ago():
    """When to begin for a certificate of 30 days that has expired."""
    return datetime.now(UTC) - timedelta(days=40)
