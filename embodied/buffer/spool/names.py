"""Names of hosts and of the streams that they may write."""

import re

from embodied.core.errors import ConfigError

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def prefix_of(host: str) -> str:
    """What the names of all streams of a host begin with. Raises ConfigError for a wrong name."""
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"host name '{host[:80]}': 1 to 63 letters, digits, '.', '_' and '-' are right, the "
            "first a letter or digit"
        )
    return f"{host}/"


def stream_name(host: str, name: str) -> str:
    """Name of a host's stream: what an actor on that host gives its steps from the start."""
    return prefix_of(host) + name
