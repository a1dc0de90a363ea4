"""Which packages are installed here: the base, the extras, and whether torch sees the GPU."""

import importlib.metadata
import re
import subprocess
import sys

from deploy.findings import Finding, failure, ok, warning
from hal.discovery import gpus

_NAME = "embodied-stack"
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?[^;]*(?:;.*extra == ['\"]([\w-]+)['\"])?"
)
_ASK_TORCH = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
_TORCH_S = 120.0


def check_packages() -> list[Finding]:
    """The base must be whole; of the extras, those that are."""
    try:
        requirements = importlib.metadata.requires(_NAME) or []
        version = importlib.metadata.version(_NAME)
    except importlib.metadata.PackageNotFoundError:
        return [failure("packages", f"{_NAME} is not installed here", "pip install its wheel")]
    base, extras = needed(requirements)
    findings: list[Finding] = []
    if missing := sorted(name for name in base if not _installed(name)):
        text = f"of the base, {', '.join(missing)} missing"
        findings.append(failure("packages", text, "install the wheel again"))
    else:
        findings.append(ok("packages", f"{_NAME} {version} and its {len(base)} packages"))
    whole = [extra for extra, names in sorted(extras.items()) if all(map(_installed, names))]
    findings.append(ok("extras", ", ".join(whole) or "none"))
    return findings


def needed(requirements: list[str]) -> tuple[set[str], dict[str, set[str]]]:
    """Names of the packages of the base, and of each extra."""
    base: set[str] = set()
    extras: dict[str, set[str]] = {}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            names = base if match[2] is None else extras.setdefault(match[2], set())
            if match[1] != _NAME:
                names.add(match[1])
    return base, {extra: names for extra, names in extras.items() if names}


def check_gpu() -> Finding:
    """NVIDIA's driver against torch, where both are there. torch is asked in another process."""
    found = gpus()
    if not found:
        return ok("GPU", "none, or no driver of NVIDIA")
    if faults := [gpu.fault for gpu in found if gpu.fault]:
        return warning("GPU", faults[0], "install the driver anew, and start the host again")
    text = "; ".join(gpu.detail for gpu in found)
    if not _installed("torch"):
        return ok("GPU", f"{text}; torch is not installed")
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=_TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return warning(
            "GPU", f"{text}; torch is silent for {_TORCH_S:.0f} s", "start the host again"
        )
    if asked.returncode:
        return warning("GPU", f"{text}; {asked.stderr.strip()[-200:]}", "install torch again")
    version, cuda, usable = asked.stdout.split()
    if usable == "True":
        return ok("GPU", f"{text}; torch {version} uses it")
    if cuda == "None":
        return warning("GPU", f"{text}; torch {version} is without CUDA", "install torch with CUDA")
    fix = f"install a driver for CUDA {cuda}, or a torch for the driver that is there"
    return warning("GPU", f"{text}; torch {version} cannot use it", fix)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
