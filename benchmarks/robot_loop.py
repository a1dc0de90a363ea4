"""Read, decide, submit at 50 Hz through the real SO-101 driver, against calling it directly.

A virtual SO-101 stands in for the arm: its own process, bus and servos at 1 Mbaud. Three loops
take turns in the same run, so that the machine's noise is the same for all:

  direct   this process calls the driver: sense, decide, drive
  device   the same driver in a Device of this process (clock, checks, motion, frames)
  agent    the same driver behind watchdog and servo process, commanded over a Unix socket

A loop's overhead is the time in a cycle that is neither the driver's nor the policy's, nor waiting:
for `device` what its thread and the caller spend, for `agent` what the caller waits for answers.

    python benchmarks/robot_loop.py [--seconds 60]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CENTRE = np.array([0.0, -1.1, 0.9, 0.2, 0.0, 0.4])
PERIOD_S = 0.02


def policy(observation, tick):
    """A chunk of 16 actions: a slow wave."""
    t = (tick + np.arange(16))[:, None] * PERIOD_S
    return (CENTRE + 0.2 * np.sin(2 * np.pi * 0.25 * t)).astype(np.float32)


def percentiles(times_s):
    """p50, p99 and maximum in ms."""
    p50, p99 = np.percentile(times_s, [50, 99]) * 1e3
    return {
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "max_ms": round(max(times_s) * 1e3, 3),
    }


class Timed:
    """A driver whose calls are timed."""

    def __init__(self, driver):
        self._driver = driver
        self.spec = driver.spec
        self.spent_s = 0.0
        self.cycles_s = []

    def __getattr__(self, name):
        return getattr(self._driver, name)

    def sense(self):
        """As the driver's; its time closes a cycle."""
        started_s = time.perf_counter()
        observation = self._driver.sense()
        self.cycles_s.append(self.spent_s + time.perf_counter() - started_s)
        self.spent_s = 0.0
        return observation

    def drive(self, action_D):
        """As the driver's."""
        started_s = time.perf_counter()
        self._driver.drive(action_D)
        self.spent_s += time.perf_counter() - started_s


def direct(driver, seconds):
    """Cycle times of calling the driver: as much as the bus and the policy take."""
    driver.open()
    cycles_s, missed = [], 0
    next_s = time.perf_counter()
    for tick in range(round(seconds / PERIOD_S)):
        started_s = time.perf_counter()
        observation = driver.sense()
        driver.drive(policy(observation, tick)[0])
        cycles_s.append(time.perf_counter() - started_s)
        next_s += PERIOD_S
        wait_s = next_s - time.perf_counter()
        missed += wait_s < 0
        time.sleep(max(0.0, wait_s))
    driver.close()
    return {"cycle": percentiles(cycles_s), "missed": missed, "cycles": len(cycles_s)}


def loop(device, seconds):
    """Commands a device tick by tick; what the caller's calls take."""
    from hal.commander import Commander

    commander = Commander(device)
    commander.move_to(CENTRE)
    begun = device.latest().tick
    end = begun + round(seconds / PERIOD_S)
    calls_s, late, missed, policy_s = [], 0, 0, []
    while (tick := device.latest().tick) < end:
        started_s = time.perf_counter()
        frame = device.latest()
        before_s = time.perf_counter()
        actions_HD = policy(frame.observation, tick)
        policy_s.append(time.perf_counter() - before_s)
        ticket = commander.send(actions_HD[1:], obs_tick=tick, start_tick=tick + 1)
        late += ticket.late_ticks > 0
        calls_s.append(time.perf_counter() - started_s - policy_s[-1])
        device.advance(tick + 1)
        missed += device.latest().tick - tick - 1
    held = sum(frame.held for frame in device.frames(max(begun, end - 4000))[:-1])
    return {
        "calls": percentiles(calls_s),
        "policy": percentiles(policy_s),
        "late": late,
        "skipped": missed,
        "held": held,
        "cycles": len(calls_s),
    }


def in_process(driver, seconds):
    """The driver in a Device of this process."""
    from embodied.core.clock import RealClock
    from hal.device import Device
    from hal.health import DeviceInfo
    from hal.safety.config import SafetyConfig

    timed = Timed(driver)
    device = Device(
        timed,
        info=DeviceInfo("arm", "so101", "here"),
        clock=RealClock(),
        safety=SafetyConfig(heartbeat_s=None, overruns=0),
    )
    with device:
        timed.cycles_s.clear()
        result = loop(device, seconds)
        info = device.info
    steps = round(device.spec.motion.servo_hz / device.spec.tick_hz)
    own_ms = round(info.hops_ms["own"][0] + result["calls"]["p50_ms"], 3)
    overruns = info.counts.get("overruns", 0)
    return result | {
        "driver": percentiles(timed.cycles_s),
        "overhead_p50_ms": own_ms,
        "hops_ms": info.hops_ms,
        "missed_share": overruns / (steps * result["cycles"]),
        "counts": dict(info.counts),
    }


def behind_agent(arm, calibration, seconds):
    """The driver behind an agent's watchdog and servo process."""
    from hal.pool.holding import Holding
    from hal.pool.pool import Pool
    from hal.pool.state import pool_path
    from hal.remote import RemoteDevice

    command = [
        str(Path(sys.executable).parent / "embodied"), "agent", "gpus=false",
        "+robot@robots.arm=so101", f"robots.arm.driver.port={arm.port}",
        f"robots.arm.driver.calibration={calibration}",
    ]  # fmt: skip
    agent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with (
            Pool(pool_path()) as pool,
            Holding(pool, "benchmark", "so101", timeout_s=60) as held,
            RemoteDevice(held.devices[0].address, held.devices[0].token) as device,
        ):
            result = loop(device, seconds)
            time.sleep(1.0)
            row = next(row for row in pool.devices() if row.id == "arm")
            return result | {
                "overhead_p50_ms": result["calls"]["p50_ms"],
                "hops_ms": device.info.hops_ms,
                "state": f"{row.health} {row.reason} {row.detail}".strip(),
            }
    finally:
        agent.terminate()
        agent.wait(timeout=20)


def main() -> None:
    """Run the three loops and print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EMBODIED_STATE"] = folder
        from hal.drivers.so101 import SO101, SO101Config
        from sim.so101.virtual import VirtualArm

        with VirtualArm(Path(folder), seed=0) as arm:
            calibration = Path(folder) / "arm.json"
            arm.write_calibration(calibration)
            config = SO101Config(port=arm.port, calibration=str(calibration))
            table = {
                "direct": direct(SO101(config), options.seconds / 2),
                "device": in_process(SO101(config), options.seconds),
                "agent": behind_agent(arm, calibration, options.seconds),
                "direct again": direct(SO101(config), options.seconds / 2),
            }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
