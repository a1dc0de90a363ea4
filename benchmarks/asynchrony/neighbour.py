"""A process that steps a simulator for a share of the time: `neighbour SHARE TASK`.

It writes a line when it begins.
"""

import sys
import time

import numpy as np

from sim import family
from sim.family import SimConfig

_EPISODE = 250


def main() -> None:
    """Until it is killed: step for that share of each of the robot's periods, and sleep else."""
    share, name = float(sys.argv[1]), sys.argv[2]
    found, task = family.find(name)
    driver = found.make_driver(task, SimConfig())
    driver.open()
    rng = np.random.default_rng(0)
    low, high = driver.spec.action.bounds()
    period_s = 1 / driver.spec.tick_hz
    print(flush=True)
    next_s, ticks = time.perf_counter(), 0
    while True:
        until_s = time.perf_counter() + share * period_s
        while time.perf_counter() < until_s:
            if ticks % _EPISODE == 0:
                driver.reset(ticks)
            driver.drive(rng.uniform(low, high).astype(np.float32))
            driver.step_time()
            driver.sense()
            ticks += 1
        next_s = max(next_s + period_s, time.perf_counter())
        if share < 1:
            time.sleep(max(0.0, next_s - time.perf_counter()))


if __name__ == "__main__":
    main()
