"""The watchdog process: starts a robot's servo process, and stops the robot when that stalls.

It is the deadman of systems that have none in hardware: if no servo step is heard of for stall_s,
it kills the servo process, opens the bus itself, writes the measured position as the goal,
latches the halt and starts the servo process anew. A servo process that died is replaced
likewise, without the latch: the robot waits for a new lease. What a watchdog before it left
unfinished, dying itself while the servo process was stopped, it finishes first.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from embodied.core.errors import StorageFullError
from embodied.core.processes import die_with_parent, run_normally, run_urgently
from embodied.core.protocols import SimulatedDriver
from hal.process.orphan import end_orphan, find_orphan
from hal.process.servo import PRESSED, STEP
from hal.robot import ServoConfig, make_driver
from hal.safety.latch import HOST_STOP, latch_file, set_latch

_POLL_S = 0.02
_PULSE_S = 0.1
_START_S = 120.0
_RECOVER_S = 60.0
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0)
_GENTLE_S = 10.0
_LONGEST_POLL_S = 0.05


class Watchdog:
    """Watches one servo process."""

    def __init__(self, config_file: Path) -> None:
        self._file = config_file
        self._config = msgspec.json.decode(config_file.read_bytes(), type=ServoConfig)
        self._driver = make_driver(self._config.robot)
        self._unlatched: set[str] = set()
        self.stopping = False

    def run(self) -> None:
        """Start, watch, recover, start again; until asked to stop."""
        self.inherit()
        failures = 0
        while not self.stopping:
            link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with link, other:
                command = [
                    sys.executable,
                    "-m",
                    "hal.process.servo",
                    str(self._file),
                    str(os.getpid()),
                    str(other.fileno()),
                ]
                process = subprocess.Popen(command, pass_fds=[other.fileno()])
                other.close()
                started_s = time.monotonic()
                run_urgently()
                try:
                    why = self._watch(process, link)
                finally:
                    run_normally()
                    forced = self._end(process)
            if self.stopping:
                if forced:
                    self._take_over(f"stalled: the servo process did not end in {_GENTLE_S:g} s")
                return
            self._take_over(why)
            failures = 0 if time.monotonic() - started_s > 60.0 else failures + 1
            time.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    def inherit(self) -> None:
        """End a servo process whose watchdog died; if it had to be killed, hold and latch."""
        orphan = find_orphan(Path(self._config.latches), self._config.id)
        if orphan is not None and (why := end_orphan(orphan, _GENTLE_S)):
            self._take_over(f"stalled: {why}")

    def _take_over(self, why: str) -> None:
        """The servo process is gone: hold the robot, and latch unless it died by itself."""
        self._say(why)
        self._recover()
        if why.startswith("stalled"):
            self._latch(self._config.id, why)

    def _watch(self, process: subprocess.Popen[bytes], link: socket.socket) -> str:
        """Return why the servo process is no good any more; "" when asked to stop.

        Only time in which this process itself was running counts as silence.
        """
        silent_s, allowed_s, pulsed_s, last_s = 0.0, _START_S, 0.0, time.monotonic()
        while not self.stopping:
            link.settimeout(_POLL_S)
            try:
                heard = link.recv(16)
                if not heard:
                    status = process.wait(timeout=_GENTLE_S)
                    return f"servo process ended with status {status}"
                silent_s = 0.0
                allowed_s = self._config.robot.stall_s if heard == STEP else _START_S
            except TimeoutError:
                now_s = time.monotonic()
                silent_s += min(now_s - last_s, _LONGEST_POLL_S)
            except ConnectionResetError:
                return "servo process ended"
            last_s = time.monotonic()
            if silent_s > allowed_s:
                return f"stalled: no servo step for {silent_s:.2f} s"
            if last_s - pulsed_s > _PULSE_S:
                pulsed_s = last_s
                with contextlib.suppress(BrokenPipeError, TimeoutError):
                    link.send(b"w")
                self._look_at_inputs(link)
        return ""

    def _look_at_inputs(self, link: socket.socket) -> None:
        """One that cannot be read counts as pressed. The servo process is told before the disk."""
        for name in self._config.robot.estop_inputs:
            try:
                pressed = Path(name).read_text().strip() == "1"
            except (OSError, UnicodeDecodeError):
                pressed = True
            if pressed:
                with contextlib.suppress(BrokenPipeError, TimeoutError):
                    link.send(PRESSED)
                self._latch(HOST_STOP, f"emergency stop input {name}")

    def _latch(self, device_id: str, reason: str) -> None:
        """Try until it is on disk: a halt must not be lost to a full one."""
        file = latch_file(Path(self._config.latches), device_id)
        try:
            set_latch(file, reason)
        except (OSError, StorageFullError) as error:
            if self.stopping or device_id in self._unlatched:
                return
            self._unlatched.add(device_id)
            timer = threading.Timer(1.0, self._latch_again, (device_id, reason))
            timer.daemon = True
            timer.start()
            self._say(f"cannot latch ({error}); trying again")

    def _latch_again(self, device_id: str, reason: str) -> None:
        self._unlatched.discard(device_id)
        self._latch(device_id, reason)

    def _end(self, process: subprocess.Popen[bytes]) -> bool:
        """End the servo process, gently where we are asked to end; whether it had to be killed."""
        if process.poll() is None and self.stopping:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GENTLE_S)
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        return True

    def _recover(self) -> None:
        """Open the bus and make the measured position the goal; a dead bus must not block us."""
        if isinstance(self._driver, SimulatedDriver):
            return
        thread = threading.Thread(target=self._hold, name="recover", daemon=True)
        thread.start()
        thread.join(timeout=_RECOVER_S)

    def _hold(self) -> None:
        started_s = time.monotonic()
        try:
            self._driver.open()
            self._driver.hold()
        except Exception as error:  # noqa: BLE001 - whatever a third party's driver raises
            self._say(f"cannot hold: {type(error).__name__}: {error}")
        else:
            self._say(f"held {1e3 * (time.monotonic() - started_s):.0f} ms after the kill")
        finally:
            self._driver.close()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log's disk may be full; the robot comes first
            sys.stderr.write(f"watchdog of {self._config.id}: {text}\n")
            sys.stderr.flush()


def main() -> int:
    """Entry: file of the ServoConfig, and the agent's number."""
    die_with_parent(int(sys.argv[2]))
    watchdog = Watchdog(Path(sys.argv[1]))

    def stop(signum: int, frame: object) -> None:
        watchdog.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watchdog.run()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
