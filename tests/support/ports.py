"""Every port that the product opens: who opens it, how it is spoken to, how it answers."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from embodied.buffer.serve import messages as buffer
from embodied.comms.codec import Types
from embodied.run.remote import messages as inference
from embodied.run.site import messages as site
from embodied.run.telemetry import Beat
from embodied.weights import wire as weights
from hal.process import messages as servo
from sim.so101 import messages as arm

Wire = Literal["requests", "direct", "push", "link", "http", "bytes"]


@dataclass(frozen=True)
class Port:
    """group: of ports in one process. opened_by: modules whose calls open it. types: of replies.
    honest: a header that it takes, and of what kind the answer is; kind: of the link."""

    group: str
    wire: Wire
    opened_by: tuple[str, ...]
    types: Types = ()
    honest: msgspec.Struct | None = None
    answer: str = ""
    kind: str = ""


_CHANNELS, _SERVO = "embodied/comms/channels.py", "hal/process/servo.py"
_GATEWAY = ("embodied/run/site/gateway.py", "embodied/comms/links/server.py")
_DIGEST = "0" * 64

PORTS = {
    "buffer": Port(
        "site",
        "requests",
        ("embodied/buffer/serve/service.py", _CHANNELS),
        buffer.REPLIES,
        buffer.StatsRequest(),
        "StatsReply",
    ),
    "gateway, control": Port(
        "site", "link", _GATEWAY, site.REPLIES, site.Join(), "Assignment", "control"
    ),
    "gateway, experience": Port(
        "site",
        "link",
        _GATEWAY,
        buffer.REPLIES,
        buffer.ResumeRequest((("honest/arm", 0),)),
        "ResumeReply",
        "experience",
    ),
    "gateway, weights": Port(
        "site",
        "link",
        _GATEWAY,
        weights.REPLIES,
        weights.WantWeights(run_id=_DIGEST, host="honest"),
        "ConfigError",
        "weights",
    ),
    "telemetry": Port(
        "site", "push", ("embodied/run/supervisor.py", _CHANNELS), (), Beat("r", 1, {})
    ),
    "metrics": Port("site", "http", ("embodied/run/site/metrics.py",)),
    "relay": Port("site", "bytes", ("sim/network.py",)),
    "servo, data": Port(
        "robot",
        "direct",
        (_SERVO, "embodied/comms/direct.py"),
        servo.DATA_REPLIES,
        servo.Describe(),
        "Description",
    ),
    "servo, pictures": Port(
        "robot",
        "requests",
        (_SERVO, _CHANNELS),
        servo.PICTURE_REPLIES,
        servo.Render(16, 16),
        "Done",
    ),
    "servo, control": Port(
        "robot",
        "requests",
        (_SERVO, _CHANNELS),
        servo.CONTROL_REPLIES,
        servo.Supervise(0, "", 0),
        "Status",
    ),
    "decisions": Port(
        "robot",
        "requests",
        ("embodied/run/site/decisions.py", "embodied/comms/deferred.py"),
        inference.REPLIES,
        inference.Check(),
        "LinkError",
    ),
    "virtual arm": Port(
        "robot",
        "requests",
        ("sim/so101/process.py", _CHANNELS),
        arm.State,
        arm.ReadState(),
        "State",
    ),
    "virtual camera": Port("robot", "http", ("sim/so101/camera.py",)),
    "policy server": Port(
        "policy",
        "requests",
        ("embodied/run/serving/process.py", "embodied/comms/deferred.py"),
        inference.REPLIES,
        inference.Check(),
        "Health",
    ),
}


class Opened:
    """The process of a group, whose ports are open until `close`."""

    def __init__(self, group: str, folder: Path) -> None:
        self.log = folder / f"{group}.log"
        environment = {**os.environ, "EMBODIED_STATE": str(folder)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("opened.py")), group, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.folder = folder
        self._addresses: dict[str, str] = {}

    def address(self, name: str) -> str:
        """Of a port; waits until the process is ready."""
        if not self._addresses:
            assert self.process.stdout is not None
            self._addresses = json.loads(self.process.stdout.readline() or "{}")
        return self._addresses[name]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)
