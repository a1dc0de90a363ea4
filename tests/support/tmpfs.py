"""A disk that can be filled: a small file system of its own for one command."""

import subprocess
import sys

import pytest

_MOUNT = 'mount -t tmpfs -o size=$0 tmpfs "$1"'


def in_tmpfs(mount, *command, size="1m") -> list[str]:
    """Argument vector that runs a command with a tmpfs mounted where only it and its children see
    it; skips the test where the kernel does not allow that."""
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            probe = [*unshare, "sh", "-c", _MOUNT, size, "/mnt"]
            done = subprocess.run(probe, capture_output=True, check=False)
        except FileNotFoundError:
            break
        if done.returncode == 0:
            run = f'{_MOUNT} && shift && exec "$@"'
            return [*unshare, "sh", "-c", run, size, str(mount), *map(str, command)]
    pytest.skip("no private mount namespace here")


def script_in_tmpfs(script, mount, *arguments, size="1m") -> list[str]:
    """The same for a Python script, whose first argument is the mount point."""
    return in_tmpfs(mount, sys.executable, "-c", script, mount, *arguments, size=size)
