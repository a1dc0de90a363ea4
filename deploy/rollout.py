"""Deploys an agent to a robot's host: what is put there, in which order, each step repeatable.

~/.local/share/embodied on the host: `releases/<version>-<digest>`, one virtual environment for each
installed wheel; `current`, a link to one of them; `identity`; `runs`. Nothing there is changed
before the host is checked, and what is there already is not done again.
"""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote as url_quote

import msgspec

from deploy.findings import Finding, ok
from deploy.remote import Content, Remote
from deploy.units import IDENTITY, Services
from deploy.wheel import Wheel
from embodied.core.errors import CorruptDataError, EmbodiedError

_LOOK_S = 60.0
_COPY_S = 1800.0
_INSTALL_S = 3600.0
_START_S = 300.0
_NOT_YET = 3


@dataclass(frozen=True)
class Software:
    """What is installed. constraints: versions, as pip reads them. wheelhouse: a folder with the
    wheels of everything, in place of the host's package index. python: that the host has."""

    wheel: Wheel
    constraints: str
    extras: tuple[str, ...]
    wheelhouse: Path | None
    python: str

    @property
    def release(self) -> str:
        """Names the virtual environment: the same for the same contents."""
        parts = (self.wheel.sha256, self.constraints, ",".join(self.extras), self.python)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return f"{self.wheel.version}-{digest[:12]}"


@dataclass(frozen=True)
class Step:
    """Something that is done on the host. done: a script that ends with 0 if nothing is to do.
    files: put into `folder` first."""

    name: str
    script: str
    done: str = f"exit {_NOT_YET}"
    folder: str = ""
    files: Mapping[str, Content] = field(default_factory=dict)
    timeout_s: float = _LOOK_S


def deployed(home: str) -> str:
    """The folder on the host that a deployment owns. home: the user's, there."""
    return f"{home}/.local/share/embodied"


def plan(home: str, software: Software, identity: Path | None) -> list[Step]:
    """The steps that put the software and the identity (a folder of `embodied pki issue`) onto a
    host. home: the user's, there."""
    root = deployed(home)
    release = f"{root}/releases/{software.release}"
    steps = [_install(root, release, software)]
    if identity is not None:
        steps.append(_identify(root, identity))
    link = shlex.quote(f"releases/{software.release}")
    switch = f"cd {shlex.quote(root)} && ln -sfn {link} .current && mv -T .current current"
    there = f'[ "$(readlink {shlex.quote(f"{root}/current")})" = {link} ] || exit {_NOT_YET}'
    return [*steps, Step(f"use {software.release}", switch, there)]


def apply(remote: Remote, step: Step) -> Finding:
    """Do what is not done yet. EmbodiedError, with what the host said, if it fails."""
    if _is_done(remote, step):
        return ok(step.name, "was there")
    if step.files:
        remote.put(step.folder, step.files, _COPY_S)
    result = remote.run(step.script, step.timeout_s)
    if result.status:
        said = (result.err.strip() or result.out.strip())[-1500:]
        raise EmbodiedError(f"{remote.target}: {step.name}: failed\n{said}")
    return ok(step.name, "done")


def preview(remote: Remote, step: Step) -> str:
    """In words and commands, what `apply` would do now."""
    if _is_done(remote, step):
        return f"{step.name}: nothing to do"
    lines = [f"{step.name}:"]
    if step.files:
        lines.append(f"  copy {', '.join(sorted(step.files))} to {step.folder}")
    return "\n".join([*lines, *(f"  {line}" for line in step.script.strip().splitlines())])


def start_command(root: str, services: Services) -> str:
    """The command that the host is given to write its units and start them."""
    command = [f"{root}/current/bin/embodied", "deploy", "units", "--json"]
    command += [f"--agent={services.agent}"]
    if services.gateway is not None:
        command += [f"--gateway={services.gateway}", f"--site={services.site}"]
    if services.system:
        command.append("--system")
    return shlex.join(command)


def doctor_command(root: str, services: Services, has_identity: bool) -> str:
    """The command by which the host looks at itself. has_identity: whether it has one now."""
    command = [f"{root}/current/bin/embodied", "doctor", "--json"]
    if services.gateway is not None:
        command.append(f"--gateway={services.gateway}")
    if has_identity:
        command.append(f"--identity={root}/{IDENTITY}")
    return shlex.join(command)


def ask(remote: Remote, command: str) -> list[Finding]:
    """Findings of a command of ours on the host. EmbodiedError if it gives none."""
    result = remote.run(command, _START_S)
    lines = result.out.strip().splitlines()
    if result.status not in (0, 1) or not lines:
        said = (result.err.strip() or result.out.strip())[-1000:]
        raise EmbodiedError(f"{remote.target}: `{command}` failed:\n{said}")
    try:
        return msgspec.json.decode(lines[-1], type=list[Finding])
    except msgspec.MsgspecError as error:
        raise CorruptDataError(
            f"{remote.target}: `{command}` gives no findings: {error}"
        ) from error


def _is_done(remote: Remote, step: Step) -> bool:
    return remote.run(step.done, _LOOK_S).status == 0


def _install(root: str, release: str, software: Software) -> Step:
    incoming = f"{root}/incoming"
    wheel = software.wheel
    extras = f"[{','.join(software.extras)}]" if software.extras else ""
    place = url_quote(f"{incoming}/{wheel.path.name}")
    files: dict[str, Content] = {
        wheel.path.name: wheel.path,
        "requirements.txt": f"embodied-stack{extras} @ file://{place}#sha256={wheel.sha256}\n".encode(),
        "constraints.txt": software.constraints.encode(),
    }
    pip = [f"{release}/bin/python", "-m", "pip", "install", "--quiet", "--no-input"]
    pip += ["--disable-pip-version-check"]
    if software.wheelhouse is not None:
        files["wheelhouse"] = software.wheelhouse
        pip += ["--no-index", "--find-links", f"{incoming}/wheelhouse"]
    pip += ["-r", f"{incoming}/requirements.txt", "-c", f"{incoming}/constraints.txt"]
    marker = shlex.quote(f"{release}/.installed")
    lines = [
        "set -e",
        f"rm -rf {shlex.quote(release)}",
        shlex.join([software.python, "-m", "venv", release]),
        shlex.join(pip),
        f"{shlex.join([f'{release}/bin/embodied', '--help'])} >/dev/null",
        f"rm -rf {shlex.quote(incoming)}",
        f"touch {marker}",
    ]
    return Step(
        f"install {software.release}",
        "\n".join(lines),
        f"test -e {marker} || exit {_NOT_YET}",
        incoming,
        files,
        _INSTALL_S,
    )


def _identify(root: str, identity: Path) -> Step:
    """Replace the whole folder, so that no file of an old identity is left beside a new one's."""
    digest = hashlib.sha256()
    files: dict[str, Content] = {}
    for path in sorted(p for p in identity.iterdir() if p.is_file()):
        content = path.read_bytes()
        files[path.name] = content
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    files[".digest"] = digest.hexdigest().encode()
    fresh, kept = f"{root}/{IDENTITY}.new", f"{root}/{IDENTITY}"
    lines = [
        "set -e",
        f"chmod 700 {shlex.quote(fresh)}",
        f"rm -rf {shlex.quote(kept)}",
        f"mv -T {shlex.quote(fresh)} {shlex.quote(kept)}",
    ]
    found = f"$(cat {shlex.quote(kept)}/.digest 2>/dev/null)"
    there = f'[ "{found}" = {digest.hexdigest()} ] || exit {_NOT_YET}'
    return Step("identity", "\n".join(lines), there, fresh, files)
