"""`python opened.py GROUP FOLDER` opens a group of `ports.PORTS` in one process, for real, and
writes their addresses; it ends with its standard input."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sites import run_gateway

from embodied.buffer.serve.service import BufferService
from embodied.comms.channels import PullChannel
from embodied.comms.links.client import Link
from embodied.comms.links.wire import Hello
from embodied.run.site.decisions import Decisions
from embodied.run.site.metrics import serve_metrics
from embodied.run.telemetry import Beat
from hal.process.servo import Servo
from hal.robot import RobotConfig, ServoConfig
from hal.safety.config import SafetyConfig
from sim.links import Profile
from sim.network import Relay
from sim.so101.camera import CAMERAS, PictureServer, Stream
from sim.so101.process import VirtualHardware
from sim.so101.robots import Follower

Opened = tuple[dict[str, str], list[Callable[[], object]]]
"""Addresses, and what has to be called again and again, each by a thread of its own."""


def site(folder: Path, stack: contextlib.ExitStack) -> Opened:
    """What a learner's host opens, and a relay to one of its ports."""
    service = BufferService(folder / "buffer-log", f"ipc://{folder}/buffer", 1 << 20)
    gateway = stack.enter_context(run_gateway(folder))
    beats = PullChannel(f"ipc://{folder}/telemetry", (Beat,))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stack.enter_context(serve_metrics(port, folder))
    relay = stack.enter_context(Relay(("127.0.0.1", port), Profile()))

    def listen() -> None:
        beats.wait(0.05)
        for beat, _ in beats.receive_ready():
            (folder / "beats").write_text(str(beat.pid))

    addresses = {
        "buffer": service.address,
        "telemetry": beats.address,
        "metrics": f"127.0.0.1:{port}",
        "relay": f"127.0.0.1:{relay.address[1]}",
    }
    for kind in ("control", "experience", "weights"):
        addresses[f"gateway, {kind}"] = gateway.address
    return addresses, [lambda: service.poll(0.05), listen]


def robot(folder: Path, stack: contextlib.ExitStack) -> Opened:
    """What a robot's host opens, and the virtual hardware of one."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    config = ServoConfig(
        id="left",
        host="here",
        robot=RobotConfig(
            driver={"name": "simulated", "task": "pointmass"},
            kind="point",
            safety=SafetyConfig(start_tolerance=None, tracking_error=None, overruns=0),
        ),
        sockets=str(folder),
        latches=str(folder),
    )
    servo = Servo(config, ours, threading.Event())
    threading.Thread(target=servo.run, daemon=True).start()

    def watch() -> None:
        theirs.sendall(b"w")
        time.sleep(0.1)

    link = stack.enter_context(Link("127.0.0.1:9", Hello("here", "", ""), None))
    decisions = Decisions(link, f"ipc://{folder}/inference")
    arm = VirtualHardware(Follower(), folder / "port", control=f"ipc://{folder}/arm", seed=0)
    threading.Thread(target=arm.run, args=(lambda: False,), daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0))
    pictures = PictureServer(listener, {name: Stream() for name in CAMERAS})
    threading.Thread(target=pictures.serve_forever, daemon=True).start()

    def decide() -> None:
        decisions.pump()
        time.sleep(0.005)

    return {
        "servo, data": config.data_address,
        "servo, pictures": config.picture_address,
        "servo, control": config.control_address,
        "decisions": f"ipc://{folder}/inference",
        "virtual arm": f"ipc://{folder}/arm",
        "virtual camera": f"127.0.0.1:{listener.getsockname()[1]}",
    }, [watch, decide]


def policy(folder: Path, stack: contextlib.ExitStack) -> Opened:
    """A policy server with a policy of random weights."""
    from served import stored

    from embodied.run.serving.process import ServeConfig, serve
    from embodied.run.serving.server import BatchingConfig
    from policies.acting import InferenceConfig

    address = f"ipc://{folder}/policy"
    config = ServeConfig(
        checkpoint=str(stored(folder / "checkpoint")),
        listen=address,
        follow=False,
        report_s=10.0,
        inference=InferenceConfig(),
        batching=BatchingConfig(rows=4, max_wait_ms=3.0, max_queued=64),
    )
    return {"policy server": address}, [lambda: serve(config, lambda: True, lambda server: None)]


GROUPS = {"site": site, "robot": robot, "policy": policy}


def _again(work: Callable[[], object]) -> None:
    """Call it for ever; a fault ends the process, as it ends the role that does this."""
    try:
        while True:
            work()
    finally:
        os._exit(70)


def main(group: str, folder: Path) -> None:
    """Serve until standard input ends."""
    with contextlib.ExitStack() as stack:
        addresses, works = GROUPS[group](folder, stack)
        for work in works:
            threading.Thread(target=_again, args=(work,), daemon=True).start()
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
