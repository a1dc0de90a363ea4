"""What is installed on a host: a wheel of this project, and the versions of what it needs."""

import hashlib
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from embodied.core.errors import ConfigError, EmbodiedError, MissingDependencyError

_SOURCE = Path(__file__).resolve().parents[1]
_NAME = "embodied-stack"
_LOCK = "requirements.lock"
_BUILD_S = 120.0
_HASH = re.compile(r" *\\\n *--hash=\S+")


@dataclass(frozen=True)
class Wheel:
    """A built distribution. extras: those that it knows."""

    path: Path
    version: str
    sha256: str
    extras: frozenset[str]

    def check_extras(self, wanted: tuple[str, ...]) -> None:
        """ConfigError unless the wheel has these extras."""
        if unknown := sorted(set(wanted) - self.extras):
            known = ", ".join(sorted(self.extras))
            raise ConfigError(f"--extras {','.join(unknown)}: {self.path.name} has {known}")


def build_wheel(folder: Path) -> Wheel:
    """Build a wheel from the source tree that this module lies in, without a network.

    Raises ConfigError where there is no source tree, MissingDependencyError where there is no
    build backend.
    """
    if not (_SOURCE / "pyproject.toml").is_file():
        raise ConfigError(
            f"{_SOURCE} is an installation and no source tree, so no wheel can be built; give one "
            "with --wheel PATH"
        )
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    try:
        built = subprocess.run(
            command, cwd=_SOURCE, capture_output=True, text=True, timeout=_BUILD_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EmbodiedError(f"the wheel was not built in {_BUILD_S:.0f} s; try again") from None
    if built.returncode:
        if "No module named hatchling" in built.stderr:
            raise MissingDependencyError(
                "no wheel can be built: the package 'hatchling' is not installed. Install the "
                "extra 'dev' (make setup does), or give a wheel with --wheel PATH"
            )
        raise EmbodiedError(f"no wheel can be built: {built.stderr.strip()[-500:]}")
    [path] = folder.glob("*.whl")
    return read_wheel(path)


def read_wheel(path: Path) -> Wheel:
    """Look at a wheel; ConfigError if it is none of this project."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            text = archive.read(names[0]).decode() if len(names) == 1 else ""
    except FileNotFoundError:
        raise ConfigError(f"--wheel {path} does not exist") from None
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ConfigError(f"--wheel {path} is no wheel: {error}") from error
    metadata = HeaderParser().parsestr(text)
    if metadata["Name"] != _NAME or not re.fullmatch(r"[\w.-]+\.whl", path.name):
        raise ConfigError(f"--wheel {path} is no wheel of {_NAME}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    extras = frozenset(metadata.get_all("Provides-Extra", []))
    return Wheel(path, metadata["Version"], digest, extras)


def constraints(lock: Path | None) -> str:
    """The versions that pip may install. lock: None for the source tree's.

    Without the lock's hashes: pip checks those only of packages that are named one by one, and
    which of them a host needs, its own pip finds out.
    """
    path = lock or _SOURCE / _LOCK
    try:
        return _HASH.sub("", path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give the {_LOCK} that belongs to the wheel with --lock PATH"
        ) from None
